"""What both scripts use around their training: settings, the run folder and checkpoints."""

from common.run.checkpoint import load_offline, save_checkpoint
from common.run.diagnosis import check_trusted
from common.run.errors import InputError
from common.run.folder import Run
from common.run.settings import prepare

__all__ = ["InputError", "Run", "check_trusted", "load_offline", "prepare", "save_checkpoint"]
