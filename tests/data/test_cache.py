"""Labels that are kept: made once, and again if their file is broken."""

from unittest import mock

import numpy as np
from toys import tiny_config

from common.data import cached_labels

DATA = (np.arange(6.0).reshape(3, 2), np.ones(3), None)
LABELS = np.array([[True, False, True]])


def settings(folder, **overrides):
    return tiny_config(cache_dir=str(folder), **overrides)


def test_labels_are_kept_and_a_broken_file_is_made_again(tmp_path):
    make, config = mock.Mock(return_value=LABELS), settings(tmp_path / "new")
    for _ in range(2):
        np.testing.assert_array_equal(cached_labels(make, DATA, config), LABELS)
    assert make.call_count == 1
    (file,) = (tmp_path / "new" / "labels").glob("*.npz")
    written = file.read_bytes()
    at = written.index(b"\x01\x00\x01", written.index(b"\n"))  # the labels, after NumPy's header
    for broken in (written[:-1], b"", written[:at] + b"\x00" + written[at + 1 :]):
        file.write_bytes(broken)
        np.testing.assert_array_equal(cached_labels(make, DATA, config), LABELS)
    assert make.call_count == 4


def test_other_data_and_settings_need_labels_of_their_own(tmp_path):
    make = mock.Mock(return_value=LABELS)
    clipped = (DATA[0].clip(0, 4), *DATA[1:])  # as CQL does with actions
    changes = {"seed": 1, "num_seeds": 2, "expectile": 0.5, "iql_steps": 60, "batch_size": 16}
    changes |= {"discount": 0.9, "target_update_rate": 0.01, "matmul_precision": "bfloat16"}
    others = [settings(tmp_path, **{field: value}) for field, value in changes.items()]
    cases = [(DATA, settings(tmp_path)), (clipped, settings(tmp_path))]
    cases += [(DATA, other) for other in others]
    for calls, (data, config) in enumerate(cases, start=1):
        cached_labels(make, data, config)
        assert make.call_count == calls
    cached_labels(make, DATA, settings(tmp_path, update_period=20))  # labels do not depend on it
    assert make.call_count == calls


def test_labels_that_cannot_be_kept_cost_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cached_labels(lambda: LABELS, DATA, settings(tmp_path / "file")) is LABELS
    assert "cannot be kept (Not a directory): set --config.cache_dir" in capsys.readouterr().err
