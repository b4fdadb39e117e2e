"""The quantized KV cache against transformers' own caches, codes read by hand, and bounds that must hold."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlquant.errors import InputError
from rlquant.llm.kv_cache import KV_SCHEMES, QuantizedCache, forward_through_cache, stored_bits

SCHEMES = list(KV_SCHEMES)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "initializer_range": 0.2,  # attention is then far from uniform, so that errors in the cache show
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
HEADS, CHANNELS = 2, 32
ONE_LAYER = Qwen2Config(**{**SIZES, "num_hidden_layers": 1})


@pytest.fixture(scope="module", params=[(Qwen2ForCausalLM, Qwen2Config), (LlamaForCausalLM, LlamaConfig)])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    network, config = request.param
    return network(config(**SIZES)).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def states(count: int, seed: int = 0, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    """Keys as models have them: every channel with a mean and a size of its own."""
    generator = torch.Generator().manual_seed(seed)
    mean = 8 * torch.randn(1, HEADS, 1, CHANNELS, generator=generator)
    size = torch.randn(1, HEADS, 1, CHANNELS, generator=generator).exp()
    return (mean + size * torch.randn(batch, HEADS, count, CHANNELS, generator=generator)).to(dtype)


def stored(cache: QuantizedCache) -> tuple[Tensor, Tensor]:
    """What the next forward reads of the first layer, as transformers asks for it."""
    keys, values = cache.layers[0].keys, cache.layers[0].values
    return cache.update(keys[:, :, :0], values[:, :, :0], 0)


def generated(model: torch.nn.Module, ids: Tensor, cache: object, new: int, **options: object) -> Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_window_that_holds_the_text_is_the_dynamic_cache(model, scheme):
    ids = tokens(2, 70)
    ours, theirs = QuantizedCache(model.config, scheme, window=128), DynamicCache(config=model.config)
    assert torch.equal(forward_through_cache(model, ids, ours), forward_through_cache(model, ids, theirs))
    for mine, reference in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, reference.keys)
        assert torch.equal(mine.values, reference.values)
    assert torch.equal(
        generated(model, ids, QuantizedCache(model.config, scheme, window=128), 12),
        generated(model, ids, DynamicCache(config=model.config), 12),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "scheme"), [(8, "int8"), (4, "int4")])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-4, 1.0, 300.0]), offset=st.floats(-50, 50))
def test_integer_codes_are_at_most_half_a_step_away(dtype, bits, scheme, seed, size, offset):
    cache = QuantizedCache(ONE_LAYER, scheme, group_size=16, window=0)
    keys, values = (size * (states(48, seed + i) + offset) for i in range(2))
    keys, values = keys.to(dtype), values.to(dtype)
    cache.update(keys, values, 0)
    for exact, read, group_axis in zip((keys, values), stored(cache), (2, 3), strict=True):
        assert read.dtype == dtype
        x, y = (t.double().numpy() for t in (exact, read))
        groups = np.stack(np.split(x, x.shape[group_axis] // 16, group_axis))
        low, high = (f(groups, axis=group_axis + 1, keepdims=True) for f in (np.min, np.max))
        unit = torch.finfo(dtype if dtype.itemsize == 2 else torch.float16).eps  # of scale and offset
        step = (high - low + unit * np.abs(low)) * (1 + unit) / (2**bits - 1) + 1e-7
        error = np.abs(np.stack(np.split(y, y.shape[group_axis] // 16, group_axis)) - groups)
        rounding = torch.finfo(dtype).eps * np.abs(groups) + 1e-6 * np.abs(low)  # of the answer's own dtype
        assert (error <= step / 2 + rounding + 1e-7).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_fp8_codes_are_within_half_a_unit_in_the_last_of_three_bits(seed):
    cache = QuantizedCache(ONE_LAYER, "fp8_e4m3", window=0)
    keys = states(64, seed)
    cache.update(keys, keys, 0)
    read = stored(cache)[0]
    largest = keys.unflatten(2, (-1, 32)).abs().amax(dim=3).repeat_interleave(32, dim=2)
    assert ((read - keys).abs() <= keys.abs() / 16 * 1.001 + largest / 448 / 2**10 * 1.01).all()


def test_int4_bytes_hold_two_codes_that_numpy_reads():
    cache = QuantizedCache(ONE_LAYER, "int4", window=32)
    keys, values = states(96, 1, torch.float16), states(96, 2, torch.float16)
    cache.update(keys, values, 0)
    layer = cache.layers[0]
    for packed, read in zip((layer._old_keys, layer._old_values), stored(cache), strict=True):
        groups = packed.groups
        assert (groups.codes.dtype, groups.scale.dtype, groups.offset.dtype) == (
            torch.uint8,
            torch.float16,
            torch.float16,
        )
        code = groups.codes.numpy()
        nibbles = np.stack([code & 15, code >> 4], axis=-1).reshape(*code.shape[:-1], 32)
        assert nibbles.min() == 0
        assert nibbles.max() == 15
        by_hand = nibbles * groups.scale.numpy().astype(np.float32) + groups.offset.numpy()
        is_key = packed is layer._old_keys
        by_hand = by_hand.swapaxes(3, 4) if is_key else by_hand
        by_hand = by_hand.reshape(2, HEADS, 64, CHANNELS).astype(np.float16)
        np.testing.assert_array_equal(read[:, :, :64].numpy(), by_hand)
    assert torch.equal(stored(cache)[0][:, :, 64:], keys[:, :, 64:])


@pytest.mark.parametrize(
    ("scheme", "bytes_per_value"), [("int8", 9 / 8), ("int4", 5 / 8), ("fp8_e4m3", 8.5 / 8)]
)
@pytest.mark.parametrize("window", [0, 64])
def test_memory_shrinks_to_codes_and_sixteen_bit_scales(scheme, bytes_per_value, window):
    keys = states(512, dtype=torch.bfloat16)
    cache = QuantizedCache(ONE_LAYER, scheme, window=window)
    assert (cache.nbytes, cache.bits_per_value) == (0, 0.0)
    cache.update(keys, keys.clone(), 0)
    per_token = 2 * 2 * HEADS * CHANNELS
    expected = per_token * ((512 - window) * bytes_per_value + window * 2)
    assert cache.nbytes == expected
    assert cache.bits_per_value == pytest.approx(8 * expected / (512 * per_token))
    assert stored_bits(scheme) == 8 * bytes_per_value
    file = io.BytesIO()
    torch.save([vars(layer) for layer in cache.layers], file)  # all the tensors there are, storages in full
    assert expected <= file.tell() < expected + 8192


def test_what_is_stored_does_not_depend_on_how_the_tokens_came():
    keys, values = states(300, 3), states(300, 4)
    whole = QuantizedCache(ONE_LAYER, "int4", window=64)
    whole.update(keys, values, 0)
    for sizes in ([1] * 300, [299, 1], [7, 193, 100]):
        parts = QuantizedCache(ONE_LAYER, "int4", window=64)
        for k, v in zip(keys.split(sizes, dim=2), values.split(sizes, dim=2), strict=True):
            parts.update(k, v, 0)
        assert parts.get_seq_length() == 300
        for mine, other in zip(stored(parts), stored(whole), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_give_what_decoding_token_by_token_gives(model, scheme):
    exact = copy.deepcopy(
        model
    ).double()  # in float32 the order of a sum moves a value across a rounding edge
    ids = tokens(1, 150)
    caches = [QuantizedCache(model.config, scheme, window=32) for _ in range(2)]
    one_by_one = forward_through_cache(exact, ids, caches[0], chunk=1)
    # An uneven start: chunks must still end where groups do.
    chunked = torch.cat(
        [forward_through_cache(exact, part, caches[1]) for part in ids.split([45, 105], 1)], 1
    )
    full = forward_through_cache(exact, ids, DynamicCache(config=model.config))
    torch.testing.assert_close(chunked, one_by_one, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        chunked[:, :64], full[:, :64], rtol=0, atol=1e-9
    )  # nothing has left the window
    assert (chunked - full)[:, 64:].abs().amax(dim=2).min() > 1e-6  # and then every token reads the cache


def test_logits_move_less_the_more_bits_there_are(model):
    ids = tokens(2, 160)
    full = forward_through_cache(model, ids, DynamicCache(config=model.config)).log_softmax(-1)

    def divergence(scheme: str) -> float:
        logits = forward_through_cache(model, ids, QuantizedCache(model.config, scheme, window=32))
        quantized = logits.log_softmax(-1)
        return float((full.exp() * (full - quantized)).sum(-1)[:, 64:].mean())

    int8, fp8, int4 = divergence("int8"), divergence("fp8_e4m3"), divergence("int4")
    assert 0 < int8 < fp8 < int4
    assert int8 < int4 / 100  # the square of the ratio of the steps, 17, is 289


@pytest.mark.parametrize("scheme", SCHEMES)
def test_greedy_generation_goes_on_where_it_stopped(model, scheme):
    ids = tokens(2, 90)
    at_once = generated(model, ids, QuantizedCache(model.config, scheme, window=32), 40)
    cache = QuantizedCache(model.config, scheme, window=32)
    text = ids
    for _ in range(4):
        text = generated(model, text, cache, 10)
    assert torch.equal(text, at_once)
    assert cache.get_seq_length() == 129


def test_left_padding_by_whole_groups_changes_nothing(model):
    ids = tokens(1, 100)
    alone = forward_through_cache(model, ids, QuantizedCache(model.config, "int4", window=32))
    other = tokens(1, 132, seed=1)
    batch = torch.cat([torch.cat([torch.zeros(1, 32, dtype=torch.long), ids], dim=1), other])
    mask = torch.ones_like(batch)
    mask[0, :32] = 0
    cache = QuantizedCache(model.config, "int4", window=32)
    padded = forward_through_cache(model, batch, cache, attention_mask=mask)
    assert (padded[0, 32:] - alone[0]).abs().max() < 2e-3 * alone.abs().max()
    tail = generated(model, batch, QuantizedCache(model.config, "int8", window=32), 8, attention_mask=mask)
    single = generated(model, ids, QuantizedCache(model.config, "int8", window=32), 8)
    assert torch.equal(tail[0, 132:], single[0, 100:])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_of_the_batch_move_with_their_codes(scheme, change: Callable[[QuantizedCache], None], chosen):
    cache = QuantizedCache(ONE_LAYER, scheme, window=32)
    cache.update(states(100, 1), states(100, 2), 0)
    before = stored(cache)
    change(cache)
    for old, new in zip(before, stored(cache), strict=True):
        assert torch.equal(new, old[chosen])


def test_beams_of_a_quantized_cache_score_what_they_say(model):
    ids = tokens(2, 80)
    options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    cache = QuantizedCache(model.config, "int8", window=0, group_size=8)
    out = generated(model, ids, cache, 24, **options)
    # The scores of beams whose caches were shuffled wrongly would not be those of their texts.
    logits = model(out.sequences).logits.log_softmax(-1)[:, 79:-1]
    exact = logits.gather(2, out.sequences[:, 80:, None]).mean(dim=(1, 2))
    assert (exact - out.sequences_scores).abs().max() < 0.02


@pytest.mark.parametrize("left", [95, 64, 50, 3, 0])
def test_crop_keeps_the_first_tokens_as_they_were_stored(left):
    cache = QuantizedCache(ONE_LAYER, "int4", window=32)
    keys = states(100, 1)
    cache.update(keys, keys, 0)
    before = stored(cache)
    cache.crop(left - 100)
    assert cache.get_seq_length() == left
    for old, new in zip(before, stored(cache), strict=True):
        assert torch.equal(new, old[:, :, :left])
    cache.update(keys[:, :, left:], keys[:, :, left:], 0)
    assert cache.get_seq_length() == 100
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    cache.update(keys, keys, 0)
    assert torch.equal(stored(cache)[0], before[0])


@pytest.mark.parametrize(
    ("backend", "options", "scheme"),
    [
        ("fp8", {}, "fp8_e4m3"),
        ("quanto", {"nbits": 4, "q_group_size": 32}, "int4"),
        ("hqq", {"nbits": 8}, "int8"),
    ],
)
def test_no_worse_than_the_quantized_cache_of_transformers(backend, options, scheme):
    try:
        theirs = transformers.QuantizedCache(backend, ONE_LAYER, **options)
    except (ImportError, ValueError, AttributeError) as reason:
        pytest.skip(f"transformers cannot make its {backend} cache here: {reason}")
    ours = QuantizedCache(ONE_LAYER, scheme, window=0)
    keys, values = states(128, 5), states(128, 6)
    nothing = keys[:, :, :0]
    ours.update(keys, values, 0)
    theirs.update(keys, values, 0)
    # Mean square error relative to each channel, which is what a query sees of it.
    variance = keys.var(dim=(0, 2), keepdim=True)
    errors = [
        ((cache.update(nothing, nothing, 0)[0] - keys).square() / variance).mean() for cache in (ours, theirs)
    ]
    assert 0 < errors[0] <= errors[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "int5"}, "unknown KV-cache scheme 'int5'. Did you mean 'int"),
        ({"group_size": 24}, "choose one of 1, 2, 4, 8, 16, 32"),
        ({"group_size": 64}, "head dimension 32"),
        ({"scheme": "int4", "group_size": 1, "window": 0}, "choose one of 2, 4"),
        ({"window": 100}, "window 100 is not a multiple of the group size 32"),
        ({"window": -32}, "window -32"),
    ],
)
def test_sizes_that_cannot_be_used_are_named(options, words):
    with pytest.raises(InputError, match=words):
        QuantizedCache(ONE_LAYER, **options)


def test_sliding_attention_is_refused():
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(InputError, match="qwen2 model also needs DynamicSlidingWindowLayer"):
        QuantizedCache(config)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e9])
def test_states_without_a_code_are_named(scheme, bad):
    keys = states(64)
    keys[1, 1, 5, 7] = bad
    cache = QuantizedCache(ONE_LAYER, scheme, window=0)
    with pytest.raises(InputError, match="the values of layer 0 hold NaN, Inf or numbers beyond"):
        cache.update(states(64), keys, 0)


def test_values_that_do_not_divide_are_named_when_they_come():
    with pytest.raises(InputError, match="does not divide the head dimension 24"):
        QuantizedCache(ONE_LAYER).update(states(4), states(4)[..., :24], 0)


def test_chunks_that_would_see_too_little_quantized_are_refused(model):
    cache = QuantizedCache(model.config)
    with pytest.raises(InputError, match="chunk 64 does not divide the cache's group size 32"):
        forward_through_cache(model, tokens(1, 64), cache, chunk=64)
    with pytest.raises(InputError, match="no tokens"):
        forward_through_cache(model, tokens(1, 0), cache)
    cache.update(states(4), states(4), 0)
    with pytest.raises(InputError, match="negative"):
        cache.crop(2)
