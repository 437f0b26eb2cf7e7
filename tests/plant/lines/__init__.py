"""The lines of the privacy design, by number, from one module an area."""

from tests.plant.lines import (
    accounting,
    auditing,
    batch_axis,
    checkpoints,
    clipping,
    independence,
    indices,
    layers,
    noise,
    ranks,
    reporting,
    sampling,
    secrets,
    self_check,
    sensitivity,
    sharding,
    trainer,
)

AREAS = (
    clipping,
    sensitivity,
    layers,
    noise,
    secrets,
    sampling,
    accounting,
    independence,
    reporting,
    batch_axis,
    indices,
    self_check,
    checkpoints,
    ranks,
    sharding,
    trainer,
    auditing,
)
LINES = sorted((line for area in AREAS for line in area.LINES), key=lambda line: line.number)
