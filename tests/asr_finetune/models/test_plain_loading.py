"""What was trained here loads where this project is not installed: transformers and PEFT alone, the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from asr_finetune.models.loading import Recognizer
from tests.asr_finetune import small_models
from tests.asr_finetune.models.test_methods import POINTWISE, prepared, private_step
from tests.slow import slow_unless

FAMILIES = {"parakeet": "ParakeetForCTC", "wav2vec2-bert": "Wav2Vec2BertForCTC"}
METHODS = ("lora", "dp_rp", "bitfit", "head", "full")
# Run from an empty folder, with an import of either package an error.
CODE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dpkernels", "asr_finetune"):
            raise ImportError(f"{name} is not there at inference")

sys.meta_path.insert(0, Blocked())
import json, torch, transformers
torch.set_num_threads(1)
cases = json.load(open("cases.json"))
for case in cases:
    kind = getattr(transformers, case["class"])
    if case["adapter"]:
        import peft
        # A new head has other classes than the base: what transformers needs to be told for any new head.
        options = {"vocab_size": case["classes"], "ignore_mismatched_sizes": True} if case["new_head"] else {}
        if case["new_head"]:
            options["pad_token_id"] = case["blank"]
        base = kind.from_pretrained(case["base"], attn_implementation="sdpa", **options)
        model = peft.PeftModel.from_pretrained(base, case["folder"])
        if case["merged"]:
            model = model.merge_and_unload()
    else:
        model = kind.from_pretrained(case["folder"], attn_implementation="sdpa")
    model.eval()
    processor = transformers.AutoProcessor.from_pretrained(case["folder"])
    batch = torch.load(case["batch"])
    with torch.no_grad():
        logits = model(**batch).logits
    torch.save({"logits": logits, "decoded": processor.tokenizer.decode(case["labels"])}, case["out"])
    ghosts = [type(module).__name__ for module in model.modules() if "dpkernels" in type(module).__module__]
    assert not ghosts, ghosts
assert not {"dpkernels", "asr_finetune"} & {name.partition(".")[0] for name in sys.modules}
try:
    import dpkernels
except ImportError:
    print("done")
"""


def case(recognizer: Recognizer, folder: Path, base: Path, *, merged: bool = False) -> dict[str, object]:
    """Save everything that plain transformers is to reproduce."""
    recognizer.save(folder / "model")
    batch, _ = small_models.batch_and_singles(recognizer)
    inputs = {"input_features": batch["input_features"], "attention_mask": batch["attention_mask"]}
    torch.save(inputs, folder / "batch.pt")
    with torch.no_grad():  # fused private layers, which gradients ask for, add in another order
        torch.save(small_models.logits(recognizer, batch), folder / "expected.pt")
    return {
        "class": type(recognizer.base).__name__,
        "adapter": recognizer.model is not recognizer.base,
        "merged": merged,
        "new_head": recognizer.new_head,
        "classes": int(recognizer.base.config.vocab_size),
        "blank": int(recognizer.base.config.pad_token_id),
        "base": str(base),
        "folder": str(folder / "model"),
        "batch": str(folder / "batch.pt"),
        "out": str(folder / "out.pt"),
        "labels": recognizer.encode_text("low").tolist(),
    }


def run_plain(folder: Path, cases: list[dict[str, object]]) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


HEADS = {"old head": False, "new head": True}


def trained(base: Path, folder: Path, new_head: bool, methods: Sequence[str]) -> list[dict[str, object]]:
    """A model of each method after a private step, saved under `folder`."""
    made = []
    for kind in methods:
        (folder / kind).mkdir(parents=True)
        targets = [*POINTWISE, "q_proj", "linear_q"] if kind == "lora" else None
        loading = {"new_head": True, "vocabulary": "characters"} if new_head else {}
        recognizer = prepared(base, kind, targets=targets, **loading)
        before = small_models.logits(recognizer, small_models.batch_and_singles(recognizer)[0])
        private_step(recognizer, (16000, 19200, 24000) if new_head else small_models.SAMPLES)
        made.append(case(recognizer, folder / kind, base))
        assert not torch.equal(torch.load(folder / kind / "expected.pt"), before)
    if not new_head:
        (folder / "merged").mkdir()
        recognizer = prepared(base, "lora", targets=[*POINTWISE, "q_proj", "linear_q"])
        private_step(recognizer)
        made.append(case(recognizer, folder / "merged", base, merged=True))
    return made


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "methods"),
    [
        ({"parakeet": "old head"}, ("lora", "full")),
        *slow_unless(
            lambda *_: False,
            [
                ({"parakeet": "old head", "wav2vec2-bert": "new head"}, METHODS),
                ({"parakeet": "new head", "wav2vec2-bert": "old head"}, METHODS),
            ],
        ),
    ],
    ids=lambda values: ", ".join(values.values() if isinstance(values, dict) else values),
)
def test_the_same_logits_without_this_project(
    folders: dict[str, Path], tmp_path: Path, heads: dict[str, str], methods: Sequence[str]
) -> None:
    """All are loaded by one process: starting it takes longer than what it does."""
    cases = [
        made
        for family, head in heads.items()
        for made in trained(folders[family], tmp_path / family, HEADS[head], methods)
    ]
    assert len(cases) == len(heads) * len(methods) + 1  # one is merged, too
    run_plain(tmp_path, cases)
    assert {made["class"] for made in cases} == {FAMILIES[family] for family in heads}
    for made in cases:
        found = torch.load(str(made["out"]))
        expected = torch.load(Path(str(made["out"])).with_name("expected.pt"))
        if made["merged"]:  # A and B multiplied into the weight: another order of rounding
            torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(found["logits"], expected), made["folder"]
        assert found["decoded"] == "low"


def test_an_import_of_this_project_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text("[]")
    code = CODE.replace("import json, torch", "import dpkernels, json, torch")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "dpkernels is not there at inference" in done.stderr
