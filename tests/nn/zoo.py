"""Small models whose examples share tensors: positions, masks, prototypes, lists, dataclasses, other layouts.

Each has an input [B, T, D] with T = 4 and D = 6, and sizes 2 (heads), 3 (prototypes), 5 (slots): at some batch size
from 1 to 12 the batch is as large as each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T, D, HEADS, KINDS, SLOTS = 4, 6, 2, 3, 5

MODELS: dict[str, Callable[[], nn.Module]] = {}


def in_zoo(model: type[nn.Module]) -> type[nn.Module]:
    MODELS[model.__name__] = model
    return model


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.5)


class Leaf(nn.Module):
    """A module of someone's own, with one parameter and a forward of any arguments."""

    def __init__(self, *shape: int, use: Callable[..., Any]) -> None:
        super().__init__()
        self.w, self.use = weights(*shape), use

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.use(self.w, *args, **kwargs)


class Zoo(nn.Module):
    """Two linear layers around what is tried."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)

    def middle(self, h: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return y


class OfLeaf(Zoo):
    shape: tuple[int, ...] = (D,)

    def __init__(self) -> None:
        super().__init__()
        self.leaf = Leaf(*self.shape, use=self.use)

    @staticmethod
    def use(w: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@in_zoo
class PositionsBesideTheInput(OfLeaf):
    shape = (8, D)
    use = staticmethod(lambda w, x, ids: x + w[ids])

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(h, torch.arange(T))


@in_zoo
class PositionsAlone(OfLeaf):
    shape = (8, D)
    use = staticmethod(lambda w, ids: w[ids])

    def middle(self, h: Tensor) -> Tensor:
        return h + self.leaf(torch.arange(T))


@in_zoo
class TableWithoutInput(OfLeaf):
    shape = (T, D)
    use = staticmethod(lambda w: w.exp())

    def middle(self, h: Tensor) -> Tensor:
        return h * self.leaf()


@in_zoo
class SquareMask(OfLeaf):
    shape = (T, T)
    use = staticmethod(lambda w, scores, mask: (scores + w).masked_fill(mask, -9.0).softmax(-1))

    def middle(self, h: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        return self.leaf(h @ h.transpose(1, 2), mask) @ h


@in_zoo
class Prototypes(OfLeaf):
    shape = (KINDS, D)
    use = staticmethod(lambda w, x, centres: (x @ (centres + w).T).softmax(-1) @ centres)

    def middle(self, h: Tensor) -> Tensor:
        return h + self.leaf(h, torch.linspace(-1, 1, KINDS * D).to(h).view(KINDS, D))


@in_zoo
class Slopes(OfLeaf):
    shape = (HEADS,)
    use = staticmethod(lambda w, scores, slopes: scores * (w * slopes).view(1, HEADS, 1, 1))

    def middle(self, h: Tensor) -> Tensor:
        heads = h.view(len(h), T, HEADS, -1).transpose(1, 2)
        scores = self.leaf(heads @ heads.transpose(2, 3), torch.tensor([0.5, 0.25]).to(h))
        return (scores @ heads).transpose(1, 2).flatten(2)


@in_zoo
class ListOfTensors(OfLeaf):
    use = staticmethod(lambda w, parts: sum(part * w for part in parts))

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf([h, torch.linspace(0, 1, T).to(h).view(T, 1), h.flip(1)])


@in_zoo
class Keywords(OfLeaf):
    use = staticmethod(lambda w, *, scale, x: x * w * scale)

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(scale=torch.linspace(1, 2, T).to(h).view(T, 1), x=h)


@dataclass
class Inner:
    values: Tensor
    places: Tensor


@dataclass
class Outer:
    inner: Inner
    name: str = "outer"


@in_zoo
class NestedDataclasses(OfLeaf):
    shape = (8, D)
    use = staticmethod(lambda w, o: Outer(Inner(o.inner.values * w[o.inner.places], o.inner.places)))

    def middle(self, h: Tensor) -> Tensor:
        y: Tensor = self.leaf(Outer(Inner(h, torch.arange(T)))).inner.values
        return y


class Pair(NamedTuple):
    x: Tensor
    places: Tensor


@in_zoo
class NamedTuples(OfLeaf):
    shape = (8, D)
    use = staticmethod(lambda w, pair: Pair(pair.x + w[pair.places], pair.places))

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(Pair(h, torch.arange(T))).x


@in_zoo
class TimeFirstLeaf(OfLeaf):
    use = staticmethod(lambda w, x: x * w + x.cumsum(0) * 0.1)

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(h.transpose(0, 1)).transpose(0, 1)


@in_zoo
class TimeFirstLayers(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(self.inner(h.transpose(0, 1))).transpose(0, 1)


@in_zoo
class TwoLayoutsOfOneLayer(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h) + self.inner(h.transpose(0, 1)).transpose(0, 1) * 0.5


@in_zoo
class TwoLayoutsOfOneLeaf(OfLeaf):
    use = staticmethod(lambda w, x: x * w)

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(h) + self.leaf(h.transpose(0, 1).cos()).transpose(0, 1)


@in_zoo
class MemoryTimeFirst(OfLeaf):
    """The second argument is [T, B, D]."""

    use = staticmethod(lambda w, x, memory: x + (memory * w).sum(0).unsqueeze(1))

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(h, h.transpose(0, 1).sin())


@in_zoo
class TensorsOfEachExample(OfLeaf):
    use = staticmethod(lambda w, parts: torch.stack([part.cumsum(0) * w for part in parts]))

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(list(h))


@in_zoo
class LengthsAsList(OfLeaf):
    use = staticmethod(
        lambda w, x, lengths: torch.stack([row[:n].sum(0) * w for row, n in zip(x, lengths, strict=True)])
    )

    def middle(self, h: Tensor) -> Tensor:
        return h + self.leaf(h, [1 + 2 * int(row[0, 0] > 0) for row in h])[:, None]


@in_zoo
class PositionTable(Zoo):
    """Ids [1, T], and their row used without its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(8, D)

    def middle(self, h: Tensor) -> Tensor:
        p = self.places(torch.arange(T)[None])
        return h + p + p[0] * p.repeat(len(h), 1, 1) + torch.cat([p] * len(h)) * h


@in_zoo
class RelativePositions(Zoo):
    """Ids [T, T], as T5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(8, HEADS)

    def middle(self, h: Tensor) -> Tensor:
        heads = h.view(len(h), T, HEADS, -1).transpose(1, 2)
        bias = self.bias((torch.arange(T)[:, None] - torch.arange(T)) + T).permute(2, 0, 1).unsqueeze(0)
        return ((heads @ heads.transpose(2, 3) + bias).softmax(-1) @ heads).transpose(1, 2).flatten(2)


@in_zoo
class ClassTable(Zoo):
    """Ids [B]: one an example."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(12, D)

    def middle(self, h: Tensor) -> Tensor:
        return h + self.classes((h.detach()[:, 0, 0] > 0).long()).unsqueeze(1)


@in_zoo
class ClassToken(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = weights(1, 1, D), weights(1, T + 1, D)

    def middle(self, h: Tensor) -> Tensor:
        return torch.cat((self.token.expand(len(h), -1, -1), h), 1) + self.places


@in_zoo
class LatentQueries(Zoo):
    """As a Perceiver's or DETR's: queries that go through layers before they meet the input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.q, self.norm = weights(SLOTS, D), nn.Linear(D, D), nn.LayerNorm(D)

    def middle(self, h: Tensor) -> Tensor:
        q = self.q(self.norm(self.queries.unsqueeze(0).expand(len(h), -1, -1)))
        return (q @ h.transpose(1, 2)).softmax(-1) @ h


@in_zoo
class SharedThroughLayers(Zoo):
    """A table that goes through layers without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.q = weights(T, D), nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        return h * self.q(self.table).sigmoid()


@in_zoo
class WeightByHand(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.q = weights(D, D), weights(D), weights(D)

    def middle(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w, self.b) + h @ self.w.T + F.linear(h, self.q.unsqueeze(0))


@in_zoo
class ConstantsOfAnySize(Zoo):
    """Raw parameters meet constants before they meet the input."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.decay, self.kinds = weights(D), weights(HEADS), weights(KINDS, D)

    def middle(self, h: Tensor) -> Tensor:
        over_time = self.decay.view(HEADS, 1) * torch.arange(T).to(h)  # [HEADS, T]
        gate = torch.linspace(0, 1, D).to(h) * self.gain.sigmoid()
        mixed = torch.linspace(0, 1, KINDS).to(h) @ self.kinds
        return h * gate * over_time.exp().sum(0).unsqueeze(1) + mixed


@in_zoo
class ParametersInAList(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = weights(D), weights(1, T, 1)

    def middle(self, h: Tensor) -> Tensor:
        for p in (self.a, self.b):
            h = h * torch.exp(p)
        return h


@in_zoo
class ScalarGain(OfLeaf):
    shape = ()
    use = staticmethod(lambda w, x, *, axes: x * w.exp() + axes)

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(h, axes=torch.linspace(0, 1, D).to(h))


@in_zoo
class ZeroAtFirst(OfLeaf):
    """A table that starts at 0: its values say nothing of which way it is read."""

    shape = (8, D)
    use = staticmethod(lambda w, x, ids: x + w[ids])

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.leaf.w)

    def middle(self, h: Tensor) -> Tensor:
        return self.leaf(h, torch.arange(T))


class ByHand(Zoo):
    """A raw parameter that has as many rows as there are examples at some batch size."""

    shape: tuple[int, ...] = (KINDS, D)

    def __init__(self) -> None:
        super().__init__()
        self.w = weights(*self.shape)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.middle(torch.tanh(self.first(x)))
        return y


@in_zoo
class ClassHead(ByHand):
    def middle(self, h: Tensor) -> Tensor:
        return F.linear(h.mean(1), F.normalize(self.w)) + torch.einsum("bd,kd->bk", h[:, 0], self.w)


@in_zoo
class Distances(ByHand):
    def middle(self, h: Tensor) -> Tensor:
        return torch.cdist(h.mean(1), self.w)


@in_zoo
class ProductFromTheRight(ByHand):
    shape = (D, KINDS)

    def middle(self, h: Tensor) -> Tensor:
        return h.mean(1) @ self.w


@in_zoo
class TableReadByData(ByHand):
    shape = (T, D)

    def middle(self, h: Tensor) -> Tensor:
        order = h.detach()[..., 0].argsort(1)
        return h * self.w[order] + F.embedding((h.detach()[..., 1] > 0).long(), self.w)


@in_zoo
class FilterByHand(ByHand):
    shape = (KINDS, T, 3)

    def middle(self, h: Tensor) -> Tensor:
        return F.conv1d(h, self.w)


@in_zoo
class LeafOfTwoOutputs(OfLeaf):
    """One output is made of the other, and one is given twice."""

    use = staticmethod(lambda w, x: (y := torch.tanh(x * w), y * w, y))

    def middle(self, h: Tensor) -> Tensor:
        first, second, third = self.leaf(h)
        return first + second * third


@in_zoo
class LearntLatents(Zoo):
    """Latents as keys and values, and as queries by keyword; a learnt first state."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.state = weights(1, SLOTS, D), weights(1, 1, D)
        self.attention, self.recurrent = (
            nn.MultiheadAttention(D, HEADS, batch_first=True),
            nn.GRU(D, D, batch_first=True),
        )

    def middle(self, h: Tensor) -> Tensor:
        latents = self.latents.expand(len(h), -1, -1)
        read = self.attention(h, latents, latents)[0]
        asked = self.attention(query=latents, key=h, value=h)[0].mean(1, keepdim=True)
        return self.recurrent(read + asked, self.state.expand(-1, len(h), -1).contiguous())[0]


@in_zoo
class LookedUpWithinACheckpoint(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.gain = nn.Embedding(8, D), weights(D)

    def block(self, h: Tensor) -> Tensor:
        return h + self.places(torch.arange(T)) * self.gain

    def middle(self, h: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.block, h, use_reentrant=False)
        return found


@in_zoo
class WrittenInPlace(Zoo):
    """A lookup that another name stands for, and that is written afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(8, D)

    def middle(self, h: Tensor) -> Tensor:
        p = self.places(torch.arange(T))
        alias = p
        p *= torch.linspace(0, 1, D).to(h)
        return h * alias


@in_zoo
class CallsItself(Zoo):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(8, D)

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        y = self(x.sin(), again=False) if again else 0.0
        z: Tensor = y + self.last(torch.tanh(self.first(x) + self.places(torch.arange(T))))
        return z
