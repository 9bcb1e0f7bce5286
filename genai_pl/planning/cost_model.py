"""Cost model of a training step: memory, traffic and time on the devices of a run, from numbers alone.

`count.py` measures a model; the functions here divide that by a layout of devices, following the papers they cite.
Times are those of
a roofline: products at a share of the peak, traffic at the bandwidth of its links, overlapping where the schedule
    allows it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """The spread of a run over devices.

    data: replicas that see different batches
    experts: replicas that hold the experts of a mixture between them
    context: devices that divide the tokens of each row; weights are sharded over them as over replicas
    copies: of the sharded model (HSDP), each among neighbouring devices
    tensor: devices that share each layer
    stages: devices of a pipeline, each of which holds some of the layers
    micro_batches: of a batch, in a pipeline
    gpipe: all forward passes come first; else the schedule is 1F1B
    loops: stages of each device in an interleaved schedule
    zero_bubble: gradients of weights fill the waits of that schedule
    sequence: hidden states between attention and MLP are sharded over the devices that share a layer
    zero: what replicas divide: 1 optimizer states, 2 gradients too, 3 weights too
    per_node: devices with fast links to each other
    regathers: weights are gathered a second time for the backward pass
    buckets: gradients are copied to be reduced, as DDP does
    """

    data: int = 1
    experts: int = 1
    context: int = 1
    copies: int = 1
    tensor: int = 1
    stages: int = 1
    micro_batches: int = 1
    gpipe: bool = False
    loops: int = 1
    zero_bubble: bool = False
    sequence: bool = False
    zero: int = 0
    per_node: int = 8
    regathers: bool = True
    buckets: bool = False

    @property
    def devices(self) -> int:
        return self.data * self.context * self.tensor * self.stages

    @property
    def shards(self) -> int:
        """Devices that see different tokens, among which ZeRO divides weights, gradients and states of a copy."""
        return self.data * self.context // self.copies

    def in_flight(self, stage: int) -> float:
        """Micro-batches that a device holds at once: under 1F1B one per stage from it on (Narayanan et al. 2019).

        Interleaved, 2 (p - 1 - rank) + (v - 1) p + 1 of one of its v stages, as the forward passes before its first
        backward pass are (Narayanan et al. 2021, section 2.2).
        """
        if self.loops > 1:
            n = 2 * (self.stages - 1 - stage) + (self.loops - 1) * self.stages + 1
            return min(n / self.loops, self.micro_batches)
        return self.micro_batches if self.gpipe else min(self.stages - stage, self.micro_batches)

    @property
    def idle(self) -> float:
        """The time that a pipeline waits as a share of its work: (p - 1) / (m v) (Narayanan et al. 2021, section 2.2).

        Of forward pass, gradient of inputs and gradient of weights, equally long, zero bubble fills two waits out of
        three (Qi et al. 2024, table 1, ZB-H1).
        """
        return (self.stages - 1) / (self.micro_batches * self.loops) / (3 if self.zero_bubble else 1)


@dataclass(frozen=True)
class Machine:
    """A device and its links.

    flops: peak of its matrix products, FLOP/s
    memory: bytes
    link, network: bytes per second to devices of the same node, and to other nodes
    efficiency: share of `flops` that a training step reaches
    """

    name: str
    flops: float
    memory: float
    link: float
    network: float
    efficiency: float = 0.4


@dataclass(frozen=True)
class Share:
    """The work of one device, after tensor and pipeline parallelism have divided the model.

    weights: parameters, of which `trained` are updated
    largest: parameters of the largest unit that FSDP gathers: a block, or everything outside of blocks
    weight_bytes: per parameter
    compute_bytes: per gathered parameter, and per number that layers hand over
    moments: numbers of optimizer state per trained parameter, as wide as weights
    largest_gradient: parameters of the largest weight, where each is stepped as soon as its gradient is known; else
        None
    experts, trained_experts: those of `weights` and `trained` that belong to routed experts
    quantized, largest_quantized: those of `weights` and `largest` that are held, and gathered, as codes
    code_bytes: per quantized parameter
    largest_matrix: parameters of the largest quantized weight, which is dequantized for a product
    """

    weights: int
    trained: int
    largest: int
    weight_bytes: int = 4
    compute_bytes: int = 4
    moments: float = 2.0
    largest_gradient: int | None = None
    experts: int = 0
    trained_experts: int = 0
    quantized: int = 0
    largest_quantized: int = 0
    code_bytes: float = 0.0
    largest_matrix: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by purpose."""

    weights: float
    gathered: float  # full weights and gradients of blocks in use, or buckets of gradients
    gradients: float
    optimizer: float
    activations: float  # saved for the backward pass of the layers
    loss: float  # a chunk of logits, and gradients that the loss computes in its forward pass
    reference: float = 0.0  # a frozen copy of the weights
    critic: float = 0.0  # weights, gradients, optimizer states and activations of a value model
    dequantized: float = 0.0  # one quantized weight in float32, while it multiplies

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(
    share: Share, layout: Layout, *, activations: float, loss: float, recomputed: float = 0.0, stage: int = 0
) -> Memory:
    """Bytes of a step on one device of a stage (Rajbhandari et al. 2020, section 5: what each ZeRO stage divides).

    activations, loss: bytes of a whole batch on this device
    recomputed: further activations, of a block that runs again, for one micro-batch at a time
    """
    codes = share.quantized * share.code_bytes
    weights, gradients, optimizer = states(
        share.weights - share.quantized + codes / share.weight_bytes,
        share.trained,
        layout,
        weight_bytes=share.weight_bytes,
        gradient_bytes=share.weight_bytes,
        optimizer_bytes=share.weight_bytes * share.moments,
    )
    gathered = 0.0
    activations = (activations * layout.in_flight(stage) + recomputed) / layout.micro_batches
    if layout.zero == 3 and layout.shards > 1:
        # the current block and the next, which is prefetched, and the gradient of one, which codes do not have
        gathered = 3 * (share.largest - share.largest_quantized) * share.compute_bytes
        gathered += 2 * share.largest_quantized * share.code_bytes
    elif layout.buckets and layout.data > 1:
        gathered = gradients
    if share.largest_gradient is not None:
        gradients = share.largest_gradient * share.weight_bytes
    dequantized = 4.0 * share.largest_matrix
    return Memory(weights, gathered, gradients, optimizer, activations, loss, dequantized=dequantized)


def states(
    n: float, trained: int, layout: Layout, *, weight_bytes: float, gradient_bytes: float, optimizer_bytes: float
) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer states of one device, for n parameters of which some are trained."""
    divisors = [layout.shards if layout.zero >= stage else 1 for stage in (3, 2, 1)]
    return (
        n * weight_bytes / divisors[0],
        trained * gradient_bytes / divisors[1],
        trained * optimizer_bytes / divisors[2],
    )


def loss_bytes(
    *, tokens: int, vocab_size: int, n_embd: int, compute_bytes: int, chunk_bytes: int, head_learns: bool
) -> float:
    """Bytes of the chunked loss: a chunk of float32 logits twice, and gradients of hidden states and head.

    chunk_bytes: largest chunk of logits
    head_learns: whether the head's weight gets a gradient
    """
    chunk = min(tokens * vocab_size * 4, chunk_bytes)
    return 2 * chunk + n_embd * (vocab_size * 4 * head_learns + tokens * compute_bytes)


@dataclass(frozen=True)
class Traffic:
    """The bytes that one device sends in an optimizer step, in one kind of collective.

    what: name of the collective, as it is printed
    n_bytes, group: sent by one device, and the devices that take part
    across_nodes, hidden: whether some are on other nodes, and whether it overlaps with products
    """

    what: str
    n_bytes: float
    group: int
    across_nodes: bool
    hidden: bool


def traffic(
    share: Share,
    layout: Layout,
    *,
    tokens: int,
    n_layer: int,
    n_embd: int,
    passes: int,
    recomputed: float,
    expert_rows: int = 0,
    kv_width: int = 0,
) -> list[Traffic]:
    """Every collective of an optimizer step of `passes` batches of `tokens` tokens that one device computes, rings throughout.

    expert_rows: rows that a token is in all mixture layers together, k in each
    kv_width: numbers in the keys and values of a token in a layer, 2 K D

    A ring of n sends (n - 1) / n of what it gathers or scatters, and twice that to all-reduce (Patarasuk and Yuan
    2009). `recomputed` is the share of blocks whose forward pass runs again. Under expert parallelism a device gathers and
    sums the experts that it holds with data / experts others.
    """
    collectives: list[Traffic] = []
    wide = layout.shards > 1 and layout.devices // layout.copies > layout.per_node
    ring = (layout.shards - 1) / layout.shards
    # between replicas, and devices that divide rows: weights and gradients
    if layout.shards > 1 and layout.zero == 3:
        # gathered for the forward pass and the backward pass (Rajbhandari et al. 2020, section 7.2.2: 1.5 times DDP)
        times = passes * (2 if layout.regathers else 1)
        own_ring = (layout.shards / layout.experts - 1) / layout.shards  # of 1 / experts of the experts
        gathered = ring * (share.weights - share.experts - share.quantized) + own_ring * share.experts
        summed = ring * (share.trained - share.trained_experts) + own_ring * share.trained_experts
        codes = ring * share.quantized * share.code_bytes
        sent = {
            "all-gather of weights": times * (gathered * share.compute_bytes + codes),
            "reduce-scatter of gradients": passes * summed * share.weight_bytes,
        }
        collectives += [Traffic(what, n_bytes, layout.shards, wide, True) for what, n_bytes in sent.items()]
    elif layout.shards > 1:
        summed = 2 * ring * share.trained * share.weight_bytes
        collectives.append(Traffic("all-reduce of gradients", summed, layout.shards, wide, True))
    if layout.copies > 1:
        # of a shard, for every batch as in FSDP2
        summed = passes * 2 * (layout.copies - 1) / layout.copies * share.trained / layout.shards * share.weight_bytes
        wide = layout.devices > layout.per_node
        collectives.append(Traffic("all-reduce between copies", summed, layout.copies, wide, True))
    # inside a layer, and between stages: hidden states
    crossing = tokens * n_embd * share.compute_bytes  # hidden states of a batch
    if layout.tensor > 1:
        # after attention and MLP, forward and backward (Shoeybi et al. 2019, section 3), forward again where it is
        # recomputed; after the embedding, and of the gradient at the head
        times = passes * (n_layer / layout.stages * (4 + 2 * recomputed) + 2)
        what = "all-reduce of hidden states"
        if layout.sequence:
            # one gather and one scatter instead send as much (Korthikanti et al. 2022, 4.2.2), and at both ends a gather
            what, times = "exchange of hidden states", times + passes
        ring = 2 * (layout.tensor - 1) / layout.tensor
        wide = layout.tensor > layout.per_node
        collectives.append(Traffic(what, times * ring * crossing, layout.tensor, wide, False))
    if layout.context > 1:
        # gathered in the forward pass, and where that runs again; gradients are scattered (Llama Team 2024, 3.3.2)
        gathered = tokens * layout.context * kv_width * share.compute_bytes
        times = passes * n_layer * (2 + recomputed) * (layout.context - 1) / layout.context
        wide = layout.context * layout.tensor > layout.per_node
        collectives.append(Traffic("exchange of keys and values", times * gathered, layout.context, wide, False))
    if layout.experts > 1:
        # to the experts and back, forward and backward, forward again where it is recomputed (Lepikhin et al. 2020)
        times = passes * (4 + 2 * recomputed) * expert_rows * (layout.experts - 1) / layout.experts
        wide = layout.experts > layout.per_node
        collectives.append(Traffic("all-to-all of tokens", times * crossing, layout.experts, wide, False))
    if layout.stages > 1:
        wide = layout.devices > layout.per_node
        sent = 2 * passes * layout.loops * crossing
        collectives.append(Traffic("send of hidden states", sent, layout.stages, wide, True))
    return collectives


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step, of its products, and of all traffic; `bottleneck` names what the step waits for."""

    compute: float
    communication: float
    step: float
    bottleneck: str


def step_time(machine: Machine, layout: Layout, sent: Iterable[Traffic], *, flops: float) -> Time:
    """The seconds of a step in which every device computes `flops`.

    Traffic of gradients and weights hides behind products, that inside a layer does not. A pipeline is `idle` for
    some of it.
    """
    compute = flops / (machine.flops * machine.efficiency) * (1 + layout.idle)
    seconds = {t: t.n_bytes / (machine.network if t.across_nodes else machine.link) for t in sent}
    # traffic that overlaps with products, and traffic that delays them
    hidden = sum(s for t, s in seconds.items() if t.hidden)
    exposed = sum(s for t, s in seconds.items() if not t.hidden)
    slowest = max(seconds, key=seconds.get, default=None)
    waits = slowest is not None and max(hidden, exposed) > compute
    where = f"communication: {slowest.what}" if waits else "computing"
    if waits:
        where += f" over the {'network' if slowest.across_nodes else 'links of a node'}"
    return Time(compute, hidden + exposed, max(compute, hidden) + exposed, where)
