"""The command line of the scripts."""

import importlib
import os
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from common.checks import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(main, name: str) -> None:
    """Runs main(config, workdir) with --config=<file>[:<task>], --config.<field>= and --workdir.

    What the user can mend ends as one line on stderr and exit status 1.
    """
    default = os.path.join(ROOT, "configs", f"{name}.py")
    try:
        config = config_flags.DEFINE_config_file("config", default, "settings: <file>[:<task>]")
        workdir = flags.DEFINE_string("workdir", None, f"default: runs/{name}/<task>/<seed>")

        def parse(argv):
            rest = flags.FLAGS(argv)
            config.value.keys()  # a file that could not be loaded raises here
            if len(rest) > 1:
                raise ValueError(f"'{rest[1]}' is no flag: settings are given as --config.<field>=")
            return rest

        def start(_):
            logging.set_verbosity(logging.WARNING)
            # TF32 and bfloat16 products, an accelerator's default, are too coarse for β_φ's steps.
            jax.config.update("jax_default_matmul_precision", "float32")
            main(config.value, workdir.value)

        app.run(start, flags_parser=parse)
    except (InputError, flags.Error, ValueError, AttributeError, OSError) as error:
        if not _is_input_error(error):
            raise
        sys.exit(f"{name}: {_one_line(error, name)}")


def _is_input_error(error) -> bool:
    """Whether the error is about what the user gave, not one of our own."""
    if isinstance(error, (InputError, flags.Error)):
        return True
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_name == "start":
            return False
        trace = trace.tb_next
    return True


def _one_line(error, name) -> str:
    if isinstance(error, AttributeError):
        fields = importlib.import_module(f"configs.{name}").get_config()
        return f"no field {' '.join(str(error).split())} The fields are {', '.join(sorted(fields))}"
    while "Traceback" in str(error) and error.__context__:
        error = error.__context__
    return " ".join(str(error).split())
