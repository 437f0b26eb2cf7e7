"""The cost of privacy: `pytest --benchmark` runs this folder, and `python -m bench.reports.report` writes the pages.

    pytest --benchmark                                  everything, on this machine's threads
    pytest --benchmark --benchmark-groups step -k lora  a part of it
    pytest --benchmark --benchmark-quick                sizes that show that it works, and no more
    python -m bench.reports.report                              README's table, docs/benchmarks.md and plots
    python -m bench.asr.strategies                          time and memory of each, with and without checkpointing
    python -m bench.scaling                             a step on one and on two processes; .modelled: on many GPUs
    python -m bench.compare HEAD~1 HEAD                 two commits in pairs, and whether they differ
    python -m bench.gpu.run --dry-run                       what a machine with a GPU would run
    python -m bench.gpu.optim                           there: bits and time of the noise and of the update
    python -m bench.gpu.normals --draws 1e8            the noise's distribution
    python -m bench.gpu.transducer                      the transducer loss beside torchaudio's and transformers'
    python -m bench.gpu.triton_table                        what Triton makes of its kernels for every architecture
    python -m bench.models                              which models are right or refused: docs/models.md

`cases` are the models and batches, `contenders` the ways to take a step; `checker` compares each contender with
float64 one-by-one gradients before `timer` lets it take its turns; `memory` measures peaks in fresh processes;
`floor` says what the machine could do at best.
"""
