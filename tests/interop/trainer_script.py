"""A training script for torchrun: PrivateTrainer on each process, and what rank 0 then has, as JSON.

torchrun --nproc-per-node=2 -m tests.interop.trainer_script FOLDER STEPS [resume]
"""

import json
import sys
import warnings
from pathlib import Path

import torch

from dpkernels.interop.trainer import PrivacyArguments
from tests.interop.trainers import KEY, case, trainer, weights_of

if __name__ == "__main__":
    folder, steps, resume = Path(sys.argv[1]), int(sys.argv[2]), "resume" in sys.argv
    warnings.filterwarnings("ignore", message="noise_key")
    private = PrivacyArguments(
        target_delta=1e-3,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        noise_key=KEY,
        ledger=str(folder / "ledger.jsonl"),
        self_check=False,
    )
    of = case("sequence")
    # 4 × 1 × 2 processes is the logical batch of 8 that the engine's own loop has.
    saved = {
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    made = trainer(
        folder,
        of,
        private=private,
        max_steps=steps,
        gradient_accumulation_steps=1,
        eval_dataset=of.data[:4],
        **saved,
    )
    made.train(resume_from_checkpoint=resume)
    if made.args.process_index == 0:
        torch.save(weights_of(of.model), folder / "weights.pt")
        facts = {
            "batch": made._expected_batch_size(),
            "steps": made.engine.steps,
            "log": made.state.log_history,
        }
        (folder / "facts.json").write_text(json.dumps(facts))
