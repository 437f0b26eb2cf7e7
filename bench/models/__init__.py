"""Which models can be trained in private: small random ones of many families, each judged by running it.

python -m bench.models                 all of them; a table on the screen, exit status 1 for a wrong one
python -m bench.models --write         and bench/results/models.json and docs/models.md
python -m bench.models --only Llama    some
python -m bench.models --part 1/4      every fourth

`kinds` has the inputs and losses, `zoo_*` the models; `judge` compares with one-by-one gradients in float64, and
`table` writes.
"""
