"""What the slot attention modules share: projections, one iteration, and the update of the slots."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from objslot.ops import _backends, _checks
from objslot.ops._arithmetic import compute_dtype
from objslot.ops.slot_attention import slot_attention
from objslot.ops.slot_loop import Epsilons, Inputs, Layers, half, slot_loop_in_turn

UPDATES = ("residual", "gru")
# Half types gain by all iterations in one call, in float32, while the layers are small: beyond, products of bfloat16
# are faster than those of float32 (timed at widths of 64 and 384).
WIDEST_HALF = 128


class Memory(NamedTuple):
    """What the slots attend to in every iteration, and the projections on the side of the slots.

    `keys` (..., n, d) and `values` (..., n, e). Folded, `keys` are the normalised inputs, `values` is None, the
    query's projection holds that of the keys, its last row the key's bias, and the updates are still to be
    projected to values. Where `inputs` are there, all iterations run in one call and normalise them: no `keys`.
    """

    inputs: Inputs | None
    keys: Tensor | None
    values: Tensor | None
    query_weight: Tensor
    query_bias: Tensor | None
    value_weight: Tensor | None
    value_bias: Tensor | None


class SlotCore(nn.Module):
    """The layers of slot attention, and one iteration of it on groups of slots.

    Locatello et al. 2020, Algorithm 1: queries from normalised slots, keys and values from normalised inputs, the
    attention of `objslot.slot_attention`, a GRU or a plain residual sum, then a residual MLP.
    """

    def __init__(
        self,
        width: int,
        *,
        input_width: int | None,
        mlp_width: int | None,
        heads: int,
        head_width: int | None,
        update: str,
        bias: bool,
        eps: float,
    ):
        super().__init__()
        for name, value in (("width", width), ("heads", heads)):
            _checks.at_least(name, value, 1)
        _checks.choice("update", update, UPDATES)
        _checks.positive("eps", eps)
        if head_width is None:
            if width % heads:
                raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
            head_width = width // heads
        input_width = width if input_width is None else input_width
        mlp_width = max(width, 128) if mlp_width is None else mlp_width
        inner = heads * head_width
        self.width, self.input_width, self.heads, self.update, self.eps = width, input_width, heads, update, eps
        self.scale = head_width**-0.5
        self.norm_inputs = nn.LayerNorm(input_width)
        self.norm_slots = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(input_width, inner, bias=bias)
        self.value = nn.Linear(input_width, inner, bias=bias)
        if inner != width or heads > 1:
            self.combine = nn.Linear(inner, width)
        else:
            self.combine = None
        self.gru = nn.GRUCell(width, width) if update == "gru" else None
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.ReLU(), nn.Linear(mlp_width, width))

    def memory(self, x: Tensor, rows: int) -> Memory:
        """What `rows` slots of all stages and iterations together read from the inputs (..., n, input_width).

        The LayerNorm's weight and bias go into the projections, which is exact. With fewer slots than positions
        the projections are folded too: q (W x) = (q W) x and sum a (W x) = W (sum a x).
        """
        folds = self.heads == 1 and rows < x.shape[-2]
        one_call = folds and self._in_one_call(x)
        dtype = compute_dtype(x.dtype) if one_call else self.key.weight.dtype
        layers = (self.key, self.value, self.query, self.norm_inputs)
        key, value, query, norm = (_cast(layer, dtype) for layer in layers)
        key_weight, value_weight = key.weight * norm.weight, value.weight * norm.weight
        key_bias = linear(norm.bias, key.weight, key.bias)
        value_bias = linear(norm.bias, value.weight, value.bias)
        if folds:
            # One product of weights, so that a slot passes through one projection and not two.
            keys = torch.cat([key_weight.mT, key_bias.unsqueeze(0)])
            query_bias = None if query.bias is None else keys @ query.bias
            folded = (keys @ query.weight, query_bias, value_weight, value_bias)
            if one_call:
                layers = (None if layer is None else layer.to(dtype) for layer in self._layers(folded))
                return Memory(Inputs(x.to(dtype), Layers._make(layers)), None, None, *folded)
            return Memory(None, self._normed(x), None, *folded)
        x = self._normed(x)
        keys, values = linear(x, key_weight, key_bias), linear(x, value_weight, value_bias)
        return Memory(None, self._split(keys), self._split(values), self.query.weight, self.query.bias, None, None)

    def _normed(self, x: Tensor) -> Tensor:
        return layer_norm(x, (self.input_width,), eps=self.norm_inputs.eps)

    def _in_one_call(self, x: Tensor) -> bool:
        """Whether `slot_loop` takes these inputs, half types in float32, given folded projections."""
        return (
            x.device.type == "cpu"
            and self.combine is None
            and x.dtype == self.query.weight.dtype
            and (x.dtype in (torch.float32, torch.float64) or max(self.width, self.input_width) <= WIDEST_HALF)
            and not torch.is_autocast_enabled("cpu")
            # A backend asked for by name may have the core alone.
            and (torch.compiler.is_compiling() or _backends.serves("slot_loop", device=x.device, dtype=x.dtype))
        )

    def step(
        self, slots: Tensor, memory: Memory, mask: Tensor | None, *, want_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One iteration: slots (..., g, p, width) and their logits (..., g, p, n), the mean over the heads."""
        query = linear(self.norm_slots(slots), memory.query_weight, memory.query_bias)
        bias = None
        if memory.values is None:
            query, bias = query[..., :-1], query[..., -1] * self.scale
        if self.heads > 1:
            query = query.unflatten(-1, (self.heads, -1)).movedim(-2, -4)
            mask = None if mask is None else mask.unsqueeze(-3)
        keys = self._normed(memory.inputs.x) if memory.keys is None else memory.keys
        dtype = keys.dtype
        found = slot_attention(
            query.to(dtype), keys, memory.values, mask,
            bias=None if bias is None else bias.to(dtype),
            scale=self.scale, eps=self.eps, return_logits=want_logits,
        )  # fmt: skip
        updates, logits = found if want_logits else (found, None)
        if memory.values is None:
            updates = linear(updates, memory.value_weight, memory.value_bias)
            if mask is not None:
                # The bias must not reach a slot that has no position at all.
                updates = updates * (mask != 0).any(-1)[..., None, None]
        if self.heads > 1:
            updates = updates.movedim(-4, -2).flatten(-2)
            logits = None if logits is None else logits.mean(-4)
        if self.combine is not None:
            updates = self.combine(updates)
        return self._updated(slots, updates), logits

    def _updated(self, slots: Tensor, updates: Tensor) -> Tensor:
        if self.gru is None:
            slots = slots + updates
        else:
            shape = slots.shape
            slots = self.gru(updates.reshape(-1, self.width), slots.reshape(-1, self.width)).reshape(shape)
        return slots + self.mlp(self.norm_mlp(slots))

    def _split(self, x: Tensor) -> Tensor:
        return x if self.heads == 1 else x.unflatten(-1, (self.heads, -1)).movedim(-2, -3)

    def iterate(
        self,
        initial: Tensor,
        memory: Memory,
        mask: Tensor | None,
        *,
        iterations: int,
        only_last: bool,
        return_iterations: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor], Memory]:
        """`iterations` steps from `initial` (..., g, p, width): slots, last logits, logits of every step, and the
        memory for the next of the stages.

        With `only_last` the gradient passes through the last step and then straight to `initial`, as if the
        earlier steps had not changed the slots; nothing of the earlier steps is kept for the backward pass.
        """
        if memory.inputs is not None:
            dtype, given = memory.inputs.x.dtype, initial.dtype
            if mask is not None and mask.is_floating_point():
                mask = mask.to(dtype)
            *found, inputs = slot_loop_in_turn(
                memory.inputs, initial.to(dtype), mask,
                scale=self.scale, eps=self._epsilons(), iterations=iterations, only_last=only_last,
                return_iterations=return_iterations,
            )  # fmt: skip
            slots, logits, before = (result.to(given) for result in found)
            history = [*(before.unbind() if iterations > 1 else ()), logits.detach()] if return_iterations else []
            return slots, logits, history, memory._replace(inputs=inputs)
        kept = torch.is_grad_enabled()
        # Iterations that nobody goes back through.
        passing = iterations if not kept else iterations - 1 if only_last else 0
        slots, history, done = initial, [], 0
        with torch.set_grad_enabled(kept and not only_last):
            if passing and self._pass_in_one_call(initial, memory, mask):
                slots, logits, history = self._pass(initial, memory, mask, passing, return_iterations)
                done = passing
            for _ in range(done, iterations - 1):
                slots, logits = self.step(slots, memory, mask, want_logits=return_iterations)
                if return_iterations:
                    history.append(logits.detach())
        if done == iterations:
            return slots, logits, history, memory
        if kept and only_last and iterations > 1:
            slots = straight_through(slots, initial)
        slots, logits = self.step(slots, memory, mask, want_logits=True)
        if return_iterations:
            history.append(logits.detach())
        return slots, logits, history, memory

    def _pass_in_one_call(self, initial: Tensor, memory: Memory, mask: Tensor | None) -> bool:
        folded = memory.values is None and self.combine is None and memory.keys is not None
        return folded and half.serves(memory.keys, initial, mask, self._layers(memory[3:]))

    def _pass(
        self, initial: Tensor, memory: Memory, mask: Tensor | None, iterations: int, return_iterations: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As `iterate`, without gradient."""
        slots, logits, earlier = half.forward(
            memory.keys, initial, mask, self._layers(memory[3:]),
            scale=self.scale, eps=self._epsilons(), iterations=iterations, return_iterations=return_iterations,
        )  # fmt: skip
        return slots, logits, [*earlier, logits] if return_iterations else []

    def _layers(self, projections: tuple[Tensor | None, ...]) -> Layers:
        gru, mlp = self.gru, self.mlp
        gates = (None,) * 4 if gru is None else (gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh)
        norms = (self.norm_slots.weight, self.norm_slots.bias, self.norm_mlp.weight, self.norm_mlp.bias)
        mlps = (mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias)
        return Layers._make((*projections, *norms, *gates, *mlps))

    def _epsilons(self) -> Epsilons:
        return Epsilons(self.eps, self.norm_inputs.eps, self.norm_slots.eps, self.norm_mlp.eps)

    def check_inputs(self, x: Tensor, mask: Tensor | None, iterations: int) -> None:
        """The arguments that both modules share; raises ValueError or TypeError."""
        _checks.tensor("x", x, "(..., n, input_width)")
        _checks.floating("x", x)
        if x.shape[-1] != self.input_width:
            raise ValueError(f"x: expected width {self.input_width} in the last dimension, got {tuple(x.shape)}")
        if mask is not None:
            _checks.tensor("mask", mask, "(..., n)")
            _checks.expandable("mask", mask, x.shape[:-1], "(..., n)")
        _checks.at_least("iterations", iterations, 1)


class _Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def _cast(layer: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> _Layer:
    return _Layer(layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def straight_through(slots: Tensor, initial: Tensor) -> Tensor:
    """The values of `slots` with the gradient of `initial`: stopgrad(slots) - stopgrad(initial) + initial."""
    return _StraightThrough.apply(slots.detach(), initial)


class _StraightThrough(torch.autograd.Function):
    # The sum written out would round: (slots - initial) + initial differs from slots in the last bits.
    @staticmethod
    def forward(ctx, slots, initial):
        return slots.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad
