"""Token statistics, losses of them and distillation over ranks: see checks.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from cases import Case, Inputs, make_inputs
from checks import SHARDS, VOCAB, Ranks, add, bounds, raised, shard_inputs, whole_result
from tolerances import Result, assert_result

import memeff


def check_returned_statistics(
    ranks: Ranks,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    backend: str = "auto",
    probabilities: bool = False,
) -> None:
    case = Case((33,), 24, VOCAB, dtype=dtype, ignored=0.3, bias=True, probabilities=probabilities)
    whole = make_inputs(case)
    if probabilities:  # of equal ones the first counts, and some tokens get it right
        logits = whole.x @ whole.w.T if whole.b is None else whole.x @ whole.w.T + whole.b
        whole.y[::2, 10] = whole.y[::2, 500] = 0.9
        whole.y[1::4] = torch.nn.functional.one_hot(logits[1::4].argmax(1), VOCAB).to(dtype)
    start, stop = bounds(sizes, ranks.rank)
    inputs = shard_inputs(case, whole, start, stop)
    _, expected = memeff.linear_cross_entropy(
        whole.x, whole.w, whole.y, linear_bias=whole.b, return_statistics=True
    )
    assert not probabilities or expected.correct.any()
    _, ours = memeff.linear_cross_entropy(
        inputs.x, inputs.w, inputs.y, linear_bias=inputs.b, return_statistics=True,
        vocab_parallel=memeff.VocabParallel(ranks.group), backend=backend,
    )  # fmt: skip
    same_statistics(ranks, ours, expected, dtype)


def same_statistics(ranks: Ranks, ours: Any, expected: Any, dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for field, value, other in zip(ours._fields, ours, expected, strict=True):
        if value is None or other is None:
            assert value is other, field
        elif value.is_floating_point():
            torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance, msg=field)
        else:
            assert torch.equal(value, other), field
    for values in zip(*ranks.gather(tuple(ours)), strict=True):
        for value in values[1:]:
            assert value is None or torch.equal(value, values[0]), "ranks differ"


def check_token_statistics(
    ranks: Ranks, dtype: torch.dtype, sizes: tuple[int, ...], targets: int, **options: Any
) -> None:
    """Values, and gradients of a sum with a different weight for every number."""
    case = Case((29,), 24, VOCAB, dtype=dtype, bias=True)
    whole = make_inputs(case)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(VOCAB, (29, targets), generator=generator)
    target[torch.rand(29, targets, generator=generator) < 0.3] = -100
    target[:, -1] = target[:, 0]  # twice the same class
    weights = torch.randn(29, targets + 2, generator=generator, dtype=torch.float64)
    start, stop = bounds(sizes, ranks.rank)
    inputs = shard_inputs(case, whole, start, stop)

    def run(inputs: Inputs, **more: Any) -> tuple[Any, Result]:
        leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.w, inputs.b)]
        x, w, b = leaves
        found = memeff.linear_token_statistics(x, w, target, linear_bias=b, **options, **more)
        total = (found.logprob * weights[:, :targets]).sum() + (found.lse * weights[:, -2]).sum()
        if found.entropy is not None:
            total = total + (found.entropy * weights[:, -1]).sum()
        value = total.detach()
        if found.logit_sum is not None:  # sums that cancel: same_statistics compares their values
            total = total + (found.logit_sum / VOCAB * weights[:, -1]).sum()
            total = total + (found.mean_logit * weights[:, -2]).sum()
        gradients = torch.autograd.grad(total, leaves)
        return found, Result(value.to(found.lse.dtype), *gradients)

    def detached(found: Any) -> Any:
        return type(found)._make(None if field is None else field.detach() for field in found)

    found, ours = run(inputs, vocab_parallel=memeff.VocabParallel(ranks.group))
    expected_statistics, one = run(whole)
    _, exact = run(whole.in_float64())
    same_statistics(ranks, detached(found), detached(expected_statistics), dtype)
    # The rule of tolerances.py, with one process in place of plain PyTorch.
    assert_result(whole_result(ranks, ours), one, exact)


def check_positions(
    ranks: Ranks, dtype: torch.dtype, sizes: tuple[int, ...], backend: str = "auto", **fields: Any
) -> None:
    """K-dimensional weights: loss with statistics and gradients, and token statistics."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(13, 16, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(VOCAB, 2, 3, 16, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(VOCAB, 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(VOCAB, (13, 2, 3), generator=generator)
    y[torch.rand(13, 2, 3, generator=generator) < 0.3] = -100
    weight = torch.rand(VOCAB, generator=generator)
    start, stop = bounds(sizes, ranks.rank)

    def run(rows: slice, dtype: torch.dtype, **more: Any) -> tuple[Any, Result]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w[rows], b[rows])]
        loss, statistics = memeff.linear_cross_entropy(
            leaves[0], leaves[1], y, linear_bias=leaves[2], weight=weight[rows], z_loss=0.01,
            return_statistics=True, **fields, **more,
        )  # fmt: skip
        found = memeff.linear_token_statistics(leaves[0], leaves[1], y, **more)
        total = loss + (0.1 * found.logprob).sum() + found.entropy.sum()
        return (found, statistics), Result(loss.detach(), *torch.autograd.grad(total, leaves))

    own, every = slice(start, stop), slice(0, VOCAB)
    shared = memeff.VocabParallel(ranks.group)
    found, ours = run(own, dtype, vocab_parallel=shared, backend=backend)
    expected, one = run(every, dtype)
    _, exact = run(every, torch.float64)
    for statistics, other in zip(found, expected, strict=True):
        detached = [
            type(s)._make(None if f is None else f.detach() for f in s) for s in (statistics, other)
        ]
        same_statistics(ranks, *detached, dtype)
    assert_result(whole_result(ranks, ours), one, exact)


_turn = count()
for _dtype in (torch.float64, torch.float32, torch.bfloat16):
    for _size in SHARDS:
        _sizes = SHARDS[_size][next(_turn) % 2]
        add(f"returned-{_dtype}-{_size}", _size, check_returned_statistics, _dtype, _sizes)
        if _dtype != torch.bfloat16:
            add(
                f"returned-probabilities-{_dtype}-{_size}", _size, check_returned_statistics,
                _dtype, SHARDS[_size][_dtype == torch.float64], probabilities=True,
            )  # fmt: skip
        add(
            f"positions-{_dtype}-{_size}", _size, check_positions, _dtype, _sizes,
            **({}, {"reduction": "sum"}, {"num_items": 7.0})[_size - 2],
        )  # fmt: skip
        add(f"statistics-{_dtype}-{_size}", _size, check_token_statistics, _dtype, _sizes, 1)
        add(
            f"top-{_dtype}-{_size}", _size, check_token_statistics, _dtype, _sizes, 3, top_k=9,
            softcap=6.0, logit_scale=torch.tensor(0.7), temperature=torch.linspace(0.4, 2, 29),
        )  # fmt: skip
        add(
            f"no-entropy-{_dtype}-{_size}", _size, check_token_statistics, _dtype, _sizes, 2,
            entropy=False, argmax=False, log_sum_sq_probs=True, logit_sum=True,
        )  # fmt: skip


def check_logprobs(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    case = Case((3, 11), 24, VOCAB, dtype=torch.float64, ignored=0.3)
    whole = make_inputs(case)
    start, stop = bounds(sizes, ranks.rank)
    ours = memeff.linear_logprobs(
        whole.x, whole.w[start:stop], whole.y, temperature=0.8, shift=True,
        vocab_parallel=memeff.VocabParallel(ranks.group),
    )  # fmt: skip
    expected = memeff.linear_logprobs(whole.x, whole.w, whole.y, temperature=0.8, shift=True)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def check_linear_loss(
    ranks: Ranks,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    reduction: str,
    backend: str = "auto",
) -> None:
    """A loss of one's own, with per-token tensors and a parameter that it closes over."""
    case = Case((90,), 24, VOCAB, dtype=dtype, ignored=0.3, bias=True)
    whole = make_inputs(case)
    start, stop = bounds(sizes, ranks.rank)
    inputs = shard_inputs(case, whole, start, stop)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.linspace(0.5, 2, 90, dtype=wide)

    def run(inputs: Inputs, **more: Any) -> tuple[Result, list[torch.Tensor]]:
        leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.w, inputs.b)]
        per_token = factor.to(more.pop("wide", wide)).requires_grad_()
        slope = torch.tensor(0.7, dtype=per_token.dtype, requires_grad=True)

        def fn(s: Any, factor: torch.Tensor) -> torch.Tensor:
            per_token = -factor * s.logprob * torch.sigmoid(slope * s.logprob) + 0.1 * s.entropy
            return per_token + 0.1 * (s.lse - s.mean_logit)

        loss = memeff.linear_loss(
            fn, leaves[0], leaves[1], inputs.y, per_token, linear_bias=leaves[2], entropy=True,
            logit_sum=True, chunk_size=32, reduction=reduction, **more,
        )  # fmt: skip
        total = loss if loss.dim() == 0 else (loss * factor.to(loss.dtype)).sum()
        gradients = torch.autograd.grad(total, [*leaves, per_token, slope])
        return Result(loss.detach(), *gradients[:3]), list(gradients[3:])

    shared = memeff.VocabParallel(ranks.group)
    ours, others = run(inputs, vocab_parallel=shared, backend=backend)
    one, expected = run(whole)
    exact, _ = run(whole.in_float64(), wide=torch.float64)
    assert_result(whole_result(ranks, ours), one, exact)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for value, other in zip(others, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)


for _size in SHARDS:
    add(f"logprobs-{_size}", _size, check_logprobs, SHARDS[_size][0])
    for _dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for _reduction in ("mean", "none"):
            add(
                f"linear_loss-{_dtype}-{_reduction}-{_size}", _size, check_linear_loss, _dtype,
                SHARDS[_size][next(_turn) % 2], _reduction,
            )  # fmt: skip


# ---- a logit_scale with a gradient ----


def check_scale(
    ranks: Ranks, dtype: torch.dtype, bias: bool, backend: str = "auto", **options: Any
) -> None:
    """Its gradient is that of one process, the same bits on every rank, whether or not the gradient
    of the hidden states is added up."""
    case = Case((3, 7), 24, VOCAB, dtype=dtype, bias=bias, ignored=0.2)
    whole = make_inputs(case)
    start, stop = bounds(SHARDS[ranks.size][0], ranks.rank)

    def gradients(inputs: Inputs, **more: Any) -> torch.Tensor:
        x, w, b = (
            None if t is None else t.clone().requires_grad_()
            for t in (inputs.x, inputs.w, inputs.b)
        )
        found = []
        for loss_of in (
            lambda **options: memeff.linear_cross_entropy(x, w, inputs.y, softcap=7.0, **options),
            lambda **options: memeff.linear_logprobs(x, w, inputs.y, **options).sum(),
            lambda **options: memeff.linear_loss(
                lambda s: -(2 * s.logprob).exp(), x, w, inputs.y, **options
            ),
        ):
            scale = torch.tensor(0.8, dtype=dtype, requires_grad=True)
            loss_of(linear_bias=b, logit_scale=scale, **more).backward()
            found.append(scale.grad)
        return torch.stack(found)

    shared = memeff.VocabParallel(ranks.group, **options)
    own = shard_inputs(case, whole, start, stop)
    ours = gradients(own, vocab_parallel=shared, backend=backend)
    assert all(torch.equal(other, ours) for other in ranks.gather(ours)), "ranks differ"
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours, gradients(whole), rtol=tolerance, atol=tolerance)


for _size in SHARDS:
    for _bias in (False, True):
        add(f"scale-{_bias}-{_size}", _size, check_scale, torch.float64, _bias)
        add(
            f"scale-partial-{_bias}-{_size}", _size, check_scale, torch.float32, _bias,
            reduce_input_grad=False,
        )  # fmt: skip


# ---- memeff.losses: of numbers that every rank has ----


def check_losses(ranks: Ranks, sizes: tuple[int, ...], backend: str = "auto") -> None:
    """All of them take log-probabilities, entropies and the like, whose gradients are those of one
    process."""
    from memeff import losses

    case = Case((4, 9), 24, VOCAB, dtype=torch.float64)
    whole = make_inputs(case)
    start, stop = bounds(sizes, ranks.rank)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(4, 9, generator=generator) < 0.7
    advantages = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    teacher_ids = torch.randint(VOCAB, (4, 9, 5), generator=generator)
    teacher = torch.randn(4, 9, 5, generator=generator, dtype=torch.float64).log_softmax(-1) - 0.1

    def of(w: torch.Tensor, **more: Any) -> tuple[torch.Tensor, ...]:
        x, w = whole.x.clone().requires_grad_(), w.clone().requires_grad_()
        numbers = memeff.linear_token_statistics(x, w, whole.y, logit_sum=True, **more)
        logprobs = numbers.logprob
        assert logprobs is not None and numbers.entropy is not None
        assert numbers.mean_logit is not None
        old = logprobs.detach() - 0.1 * advantages
        sums = losses.sequence_logprobs(logprobs, mask)
        averages = losses.sequence_logprobs(logprobs, mask, average=True)
        among = memeff.linear_logprobs(x, w, teacher_ids, **more)
        found = (
            losses.grpo_loss(logprobs, advantages, mask, old_logprobs=old, ref_logprobs=old,
                             beta=0.1, entropy=numbers.entropy, entropy_coef=0.02),
            losses.ppo_loss(logprobs, old, advantages, mask),
            losses.dpo_loss(sums[:2], sums[2:], sums[:2].detach() + 1, sums[2:].detach()),
            losses.kto_loss(sums, sums.detach() - 1, sums.detach() > sums.detach().mean()),
            losses.cpo_loss(sums[:2], sums[2:], -averages[:2].mean()),
            losses.orpo_loss(averages[:2], averages[2:], -averages[:2].mean()),
            losses.simpo_loss(averages[:2], averages[2:]),
            losses.focal_loss(logprobs).sum(),
            losses.label_smoothed_cross_entropy(logprobs, numbers.lse, numbers.mean_logit).sum(),
            losses.z_loss(numbers.lse).sum(),
            losses.top_k_distillation_loss(among, teacher, mask),
        )  # fmt: skip
        weights = torch.linspace(1, 2, len(found), dtype=torch.float64)
        values = torch.stack(found)
        return values.detach(), *torch.autograd.grad((values * weights).sum(), (x, w))

    shared = memeff.VocabParallel(ranks.group)
    values, dx, dw = of(whole.w[start:stop], vocab_parallel=shared, backend=backend)
    expected_values, expected_dx, expected_dw = of(whole.w)
    torch.testing.assert_close(values, expected_values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dw, expected_dw[start:stop], rtol=1e-11, atol=1e-11)


def check_distillation(
    ranks: Ranks, dtype: torch.dtype, sizes: tuple[int, ...], beta: float, **options: Any
) -> None:
    """Two heads whose rows the ranks have, some classes impossible, some tokens masked."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    heads = [(random(3, 13, d), random(VOCAB, d), random(VOCAB)) for d in (24, 16)]
    for k, (_, _, bias) in enumerate(heads):
        bias[1] = -torch.inf  # on both sides
        if 0 < beta < 1:  # otherwise the divergence may be infinite
            bias[2 * k] = -torch.inf
    mask = torch.rand(3, 13, generator=generator) < 0.7
    start, stop = bounds(sizes, ranks.rank)

    def run(heads: list[tuple[torch.Tensor, ...]], **more: Any) -> Result:
        (x, w, b), (teacher_x, teacher_w, teacher_b) = heads
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = memeff.losses.linear_distillation_loss(
            leaves[0], leaves[1], teacher_x, teacher_w, mask, student_bias=leaves[2],
            teacher_bias=teacher_b, beta=beta, temperature=1.3, teacher_logit_scale=0.7,
            # A cap makes every class possible, of which the reverse divergence is infinite.
            student_softcap=None if beta == 1 else 9.0, chunk_size=10, **more,
        )  # fmt: skip
        factor = torch.tensor(0.7, dtype=loss.dtype)
        return Result(loss.detach(), *torch.autograd.grad(loss, leaves, factor))

    shared = memeff.VocabParallel(ranks.group, **options)
    rows = [(x, w[start:stop], b[start:stop]) for x, w, b in heads]
    ours, again = (whole_result(ranks, run(rows, vocab_parallel=shared)) for _ in range(2))
    for name in ("loss", "dx", "dw", "db"):
        assert torch.equal(getattr(ours, name), getattr(again, name)), name
    one = run(heads)
    exact = run([tuple(t.double() for t in head) for head in heads])
    if options:  # contributions to dX are rounded to bf16
        assert ours.dx is not None and exact.dx is not None
        assert 0 < (ours.dx - exact.dx).norm() < 2**-7 * exact.dx.norm()
        ours, one, exact = (replace(result, dx=None) for result in (ours, one, exact))
    assert_result(ours, one, exact)


for _size in SHARDS:
    add(f"losses-{_size}", _size, check_losses, SHARDS[_size][0])
    for _beta in (0.0, 0.3, 1.0):
        _number = next(_turn)
        for _dtype in (torch.float64, (torch.float32, torch.bfloat16, torch.float16)[_number % 3]):
            add(
                f"distillation-{_beta}-{_dtype}-{_size}", _size, check_distillation, _dtype,
                SHARDS[_size][_number % 2], _beta,
            )  # fmt: skip


def check_vocab_size(ranks: Ranks) -> None:
    x, w, shared = torch.randn(3, 4), torch.randn(5, 4), memeff.VocabParallel(ranks.group)
    message = raised(
        lambda: memeff.losses.linear_distillation_loss(
            x, w, x, w, vocab_size=4, vocab_parallel=shared
        )
    )
    assert "ValueError: vocab_size is 4, expected None with vocab_parallel" in message, message


def check_distillation_faults(ranks: Ranks) -> None:
    """Ranks about to compute different things, and an error of one of them, end the call of all."""
    from memeff.losses import linear_distillation_loss

    generator = torch.Generator().manual_seed(ranks.rank)
    x, w = torch.ones(6, 4), torch.randn(5, 4, generator=generator)
    shared = memeff.VocabParallel(ranks.group)
    last = ranks.rank == ranks.size - 1
    for different, expected in (
        ({"beta": 0.3}, "beta is 0.5 on rank 0, and beta is 0.3 on rank 1; expected the same"),
        ({"chunk_size": 3}, "chunk_size is 0 on rank 0, and chunk_size is 3 on rank 1"),
        ({"student_bias": w[:, 0]}, "student_bias is None on rank 0, and student_bias is torch.f"),
        ({"num_items": 7}, "1 / num_items is 0.16666667"),
        ({"mask": torch.arange(6) > 2}, "mask is 6 tokens whose positions add up to 15 on rank 0"),
        ({"temperature": -1.0}, "ValueError: temperature is -1.0"),
    ):
        options = different if last else {}
        message = raised(
            partial(linear_distillation_loss, x, w, x, w.flip(0), vocab_parallel=shared, **options)
        )
        assert expected in message, message
    budget = None if last else 3000  # the smallest holds for all
    loss = linear_distillation_loss(x, w, x, w.flip(0), vocab_parallel=shared, memory_budget=budget)
    assert all(torch.equal(other, loss) for other in ranks.gather(loss))
    # Much to compare: every option, with numbers of many digits.
    loss = linear_distillation_loss(
        x.bfloat16(), w.bfloat16(), x.bfloat16(), w.flip(0).bfloat16(),
        student_bias=w[:, 0].bfloat16(), teacher_bias=w[:, 1].bfloat16(), mask=torch.arange(6) > 2,
        beta=1 / 3, temperature=1 / 0.7, student_softcap=100 / 3, teacher_softcap=200 / 3,
        student_logit_scale=-1 / 7e-11, teacher_logit_scale=-1 / 3e-11,
        memory_budget=10**12, num_items=1 / 3,
        vocab_parallel=memeff.VocabParallel(ranks.group, reduce_dtype=torch.bfloat16),
    )  # fmt: skip
    assert all(torch.equal(other, loss) for other in ranks.gather(loss))


def check_per_token_fault(ranks: Ranks) -> None:
    """Also an error that linear_loss finds after the checks of the call itself."""
    x, w = torch.ones(6, 4, requires_grad=True), torch.randn(5, 4)
    shared = memeff.VocabParallel(ranks.group)
    weights = torch.ones(6 if ranks.rank == 0 else 7)
    message = raised(
        lambda: memeff.linear_loss(
            lambda s, weights: -weights * s.logprob,
            x,
            w,
            torch.arange(6),
            weights,
            vocab_parallel=shared,
        )
    )
    assert "per_token_tensors[0] has shape (7,)" in message, message


add("distillation-vocab-size", 2, check_vocab_size)
add("distillation-faults", 2, check_distillation_faults)
add("per-token-fault", 2, check_per_token_fault)
add(
    "distillation-reduce", 2, check_distillation, torch.float32, SHARDS[2][0], 0.3,
    reduce_dtype=torch.bfloat16,
)  # fmt: skip
