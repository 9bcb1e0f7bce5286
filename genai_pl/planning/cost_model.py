"""What a training step costs on the devices of a run: memory, traffic and time, from numbers alone."""

from collections.abc import Iterable
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a run lies on its devices: how many see different batches, share a layer, and hold some of the layers each.

    zero: what the devices that see different batches divide: 1 optimizer states, 2 gradients too, 3 weights too.
    """

    data: int = 1
    tensor: int = 1
    stages: int = 1
    microbatches: int = 1  # of a batch, in a pipeline
    gpipe: bool = False  # all of them go forward first; else 1F1B
    sequence: bool = False  # hidden states between attention and MLP are in pieces on the devices that share a layer
    zero: int = 0
    per_node: int = 8
    regathers: bool = True  # weights are gathered a second time for the backward pass
    buckets: bool = False  # gradients are copied to be reduced, as DDP does

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.stages

    def in_flight(self, stage: int) -> int:
        """Microbatches that a stage holds at once: under 1F1B one for each stage from it on (Narayanan et al. 2019)."""
        return self.microbatches if self.gpipe else min(self.stages - stage, self.microbatches)


@dataclass(frozen=True)
class Machine:
    """A device: FLOP/s of its matrix products, bytes of memory, bytes per second to its neighbours and to other nodes."""

    name: str
    flops: float
    memory: float
    link: float
    network: float
    efficiency: float = 0.4  # share of `flops` that a training step reaches


@dataclass(frozen=True)
class Share:
    """What one device works on; tensor and pipeline parallelism have divided it already."""

    weights: int  # how many numbers
    trained: int  # how many of them learn
    largest: int  # numbers of the block, or the parts outside of blocks, that are gathered together
    weight_bytes: int = 4  # per number
    compute_bytes: int = 4  # per number of a gathered weight, or of what layers hand over
    moments: float = 2.0  # numbers of optimizer state per trained one, as wide as weights
    largest_gradient: int | None = None  # numbers of it, where each weight is stepped as soon as its gradient is known


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gathered: float  # whole weights and gradients of a block, or copies of gradients, while they are worked on
    gradients: float
    optimizer: float
    activations: float  # what the backward pass of the layers needs
    loss: float  # a chunk of logits, and the gradients that the loss holds until the backward pass
    reference: float = 0.0  # a frozen copy of the weights
    critic: float = 0.0  # weights, gradients, optimizer states and activations of a model that judges states

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(share: Share, layout: Layout, *, activations: float, loss: float, stage: int = 0) -> Memory:
    """The bytes of a step (Rajbhandari et al. 2020, section 5: what is divided by the number of devices at which stage)."""
    weights, gradients, optimizer = states(
        share.weights,
        share.trained,
        layout,
        weight_bytes=share.weight_bytes,
        gradient_bytes=share.weight_bytes,
        optimizer_bytes=share.weight_bytes * share.moments,
    )
    gathered = 0.0
    activations *= layout.in_flight(stage) / layout.microbatches
    if layout.zero == 3 and layout.data > 1:
        # the block at work and the next, which is fetched meanwhile, and the gradient of one
        gathered = 3 * share.largest * share.compute_bytes
    elif layout.buckets and layout.data > 1:
        gathered = gradients
    if share.largest_gradient is not None:
        gradients = share.largest_gradient * share.weight_bytes
    return Memory(weights, gathered, gradients, optimizer, activations, loss)


def states(
    n: int, trained: int, layout: Layout, *, weight_bytes: float, gradient_bytes: float, optimizer_bytes: float
) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer states of one device."""
    divisors = [layout.data if layout.zero >= stage else 1 for stage in (3, 2, 1)]
    return (
        n * weight_bytes / divisors[0],
        trained * gradient_bytes / divisors[1],
        trained * optimizer_bytes / divisors[2],
    )


def loss_bytes(
    *, tokens: int, vocab_size: int, n_embd: int, compute_bytes: int, chunk_bytes: int, head_learns: bool
) -> float:
    """A chunk of float32 logits with its copy for the product, and the gradients of hidden states and head."""
    chunk = min(tokens * vocab_size * 4, chunk_bytes)
    return 2 * chunk + n_embd * (vocab_size * 4 * head_learns + tokens * compute_bytes)


@dataclass(frozen=True)
class Traffic:
    """What one device sends in an optimizer step, in a collective among `group` devices."""

    what: str
    n_bytes: float
    group: int
    across_nodes: bool
    hidden: bool  # whether it goes on while products are computed


def traffic(
    share: Share, layout: Layout, *, tokens: int, n_layer: int, n_embd: int, passes: int, recomputed: float
) -> list[Traffic]:
    """Every collective of an optimizer step of `passes` batches of `tokens` tokens per device, rings throughout.

    A ring of n sends (n - 1) / n of what it gathers or scatters, and twice that to sum on all (Patarasu and Yuan 2009).
    `recomputed` is the share of blocks whose forward pass runs again.
    """
    collectives: list[Traffic] = []
    wide = layout.data > 1 and layout.devices > layout.per_node
    ring = (layout.data - 1) / layout.data
    if layout.data > 1 and layout.zero == 3:
        # gathered for the forward pass and the backward pass (Rajbhandari et al. 2020, section 7.2.2: 1.5 times DDP)
        times = passes * (2 if layout.regathers else 1)
        gathered, summed = share.weights * share.compute_bytes, share.trained * share.weight_bytes
        collectives.append(Traffic("all-gather of weights", times * ring * gathered, layout.data, wide, True))
        collectives.append(Traffic("reduce-scatter of gradients", passes * ring * summed, layout.data, wide, True))
    elif layout.data > 1:
        summed = 2 * ring * share.trained * share.weight_bytes
        collectives.append(Traffic("all-reduce of gradients", summed, layout.data, wide, True))
    crossing = tokens * n_embd * share.compute_bytes  # hidden states of a batch
    if layout.tensor > 1:
        # after attention and MLP, forward and backward (Shoeybi et al. 2019, section 3), forward again where it reruns;
        # after the embedding, and of what the head says of them
        times = passes * (n_layer / layout.stages * (4 + 2 * recomputed) + 2)
        what = "all-reduce of hidden states"
        if layout.sequence:
            # one gather and one scatter instead send as much (Korthikanti et al. 2022, 4.2.2), and at both ends a gather
            what, times = "exchange of hidden states", times + passes
        ring = 2 * (layout.tensor - 1) / layout.tensor
        wide = layout.tensor > layout.per_node
        collectives.append(Traffic(what, times * ring * crossing, layout.tensor, wide, False))
    if layout.stages > 1:
        wide = layout.devices > layout.per_node
        collectives.append(Traffic("send of hidden states", 2 * passes * crossing, layout.stages, wide, True))
    return collectives


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step, and what it waits for."""

    compute: float
    communication: float
    step: float
    bottleneck: str


def step_time(machine: Machine, layout: Layout, sent: Iterable[Traffic], *, flops: float) -> Time:
    """The seconds of a step in which every device computes `flops`.

    Traffic of gradients and weights hides behind products, that inside a layer does not. A pipeline of p stages is idle
    for (p - 1) / m of its work over m microbatches (Narayanan et al. 2021, section 2.2).
    """
    compute = flops / (machine.flops * machine.efficiency) * (1 + (layout.stages - 1) / layout.microbatches)
    seconds = {t: t.n_bytes / (machine.network if t.across_nodes else machine.link) for t in sent}
    hidden = sum(s for t, s in seconds.items() if t.hidden)
    exposed = sum(s for t, s in seconds.items() if not t.hidden)
    slowest = max(seconds, key=seconds.get, default=None)
    waits = slowest is not None and max(hidden, exposed) > compute
    where = f"communication: {slowest.what}" if waits else "computing"
    if waits:
        where += f" over the {'network' if slowest.across_nodes else 'links of a node'}"
    return Time(compute, hidden + exposed, max(compute, hidden) + exposed, where)
