from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asr_finetune.files import write_json


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_has_not_leaves_the_old_file(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"é": value})
    assert path.read_text() == '{\n  "é": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]
