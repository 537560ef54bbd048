import json
import shutil
import warnings
import weakref

import pytest
import torch

from tests.diffusion.tiny import MAX_LENGTH, WORDS, build_tokenizer
from threestudio_pgc.diffusion import prompts
from threestudio_pgc.diffusion.prior import PriorError
from threestudio_pgc.diffusion.prompts import (
    DIRECTIONS,
    PromptWarning,
    UnknownPromptWords,
    default_cache_dir,
    direction_index,
    encode_prompts_sdxl,
    known_words,
    make_conditioning,
    model_fingerprint,
    view_prompts,
    warn_unknown_words,
)

PROMPT = "a red vase"


@pytest.fixture
def encode(tiny_sdxl, tmp_path):
    def run(texts, model=tiny_sdxl, **options):
        return encode_prompts_sdxl(model, texts, cache_dir=tmp_path / "cache", **options)

    return run


@pytest.fixture
def no_encoders(monkeypatch):
    """Call it once the cache is filled: from then on, encoding is a failure."""
    return lambda: monkeypatch.setattr(prompts, "_encode", lambda *_: pytest.fail("encoded again"))


def files(tmp_path):
    return sorted((tmp_path / "cache").iterdir())


# ---------------------------------------------------------------------------------------------------------------- encoding


def test_no_prompts(encode, tmp_path):
    assert encode([]) == {}
    assert not (tmp_path / "cache").exists()


def test_equals_the_pipelines_own_encoding(encode, tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    texts = [PROMPT, "a zebra cup, overhead view", ""]
    encoded = encode(texts, zero_empty=False)
    for text in texts:
        with torch.no_grad():
            embedding, negative, pooled, negative_pooled = pipeline.encode_prompt(text, negative_prompt="", device="cpu")
        assert torch.equal(encoded[text].embedding, embedding[0])
        assert torch.equal(encoded[text].pooled, pooled[0])
        assert torch.equal(encoded[""].embedding, negative[0])
        assert torch.equal(encoded[""].pooled, negative_pooled[0])
    assert encoded[PROMPT].embedding.shape == (MAX_LENGTH, 24)
    assert encoded[PROMPT].pooled.shape == (12,)


def test_the_empty_prompt_may_be_zeros(encode):
    zeros = encode(["", PROMPT], zero_empty=True)
    assert not zeros[""].embedding.any() and not zeros[""].pooled.any()
    plain = encode(["", PROMPT], zero_empty=False)
    assert plain[""].embedding.any()
    assert torch.equal(zeros[PROMPT].embedding, plain[PROMPT].embedding)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_model_says_what_its_empty_prompt_is(encode, tiny_sdxl, tmp_path, zeros):
    model = shutil.copytree(tiny_sdxl, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    assert bool(encode([""], model=model)[""].embedding.any()) is not zeros


def test_bf16_encoders_give_float32(encode):
    half, full = encode([PROMPT], dtype="bf16")[PROMPT], encode([PROMPT])[PROMPT]
    assert half.embedding.dtype == torch.float32
    assert 0 < (half.embedding - full.embedding).abs().max() < 0.1


def test_each_encoder_is_freed_before_the_next_is_loaded(encode, monkeypatch):
    alive, load = [], prompts._load_encoder

    def watched_load(*arguments):
        assert [reference() for reference in alive] == [None] * len(alive)
        encoder = load(*arguments)
        alive.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(prompts, "_load_encoder", watched_load)
    encode([PROMPT, ""])
    assert [reference() for reference in alive] == [None, None]


def test_conditioning_of_views(encode):
    encoded = encode([*view_prompts(PROMPT), "", "cup"])
    chosen = [view_prompts(PROMPT)[index] for index in (1, 0, 1)]
    conditioning = make_conditioning(encoded, chosen)
    assert conditioning.cond.shape == conditioning.uncond.shape == (3, MAX_LENGTH, 24)
    assert conditioning.pooled_cond.shape == conditioning.pooled_uncond.shape == (3, 12)
    for view, text in enumerate(chosen):
        assert torch.equal(conditioning.cond[view], encoded[text].embedding)
        assert torch.equal(conditioning.pooled_cond[view], encoded[text].pooled)
        assert torch.equal(conditioning.uncond[view], encoded[""].embedding)
    assert torch.equal(make_conditioning(encoded, chosen, ["", "cup", ""]).pooled_uncond[1], encoded["cup"].pooled)
    with pytest.raises(ValueError, match="found 2 negative prompts for 3 prompts"):
        make_conditioning(encoded, chosen, ["", ""])


# ------------------------------------------------------------------------------------------------------------------- cache


def test_a_hit_is_bitwise_the_same_and_needs_no_encoder(encode, no_encoders):
    first = encode([PROMPT, ""])
    no_encoders()
    for text, item in encode(["", PROMPT]).items():
        assert torch.equal(item.embedding, first[text].embedding)
        assert torch.equal(item.pooled, first[text].pooled)


def test_what_is_cached_does_not_depend_on_its_company(encode, tmp_path):
    encode([PROMPT])
    alone = files(tmp_path)[0].read_bytes()
    shutil.rmtree(tmp_path / "cache")
    encode(["a zebra cup", PROMPT, ""])
    assert alone in [file.read_bytes() for file in files(tmp_path)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff" * 64),
    ],
)
def test_a_corrupted_file_is_encoded_again(encode, tmp_path, no_encoders, damage):
    first = encode([PROMPT])[PROMPT]
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    damage(file)
    assert torch.equal(encode([PROMPT])[PROMPT].embedding, first.embedding)
    assert file.read_bytes() == whole
    no_encoders()
    assert torch.equal(encode([PROMPT])[PROMPT].pooled, first.pooled)


def test_a_file_of_something_else_is_encoded_again(encode, tmp_path):
    from safetensors.torch import save_file

    first = encode([PROMPT])[PROMPT]
    (file,) = files(tmp_path)
    for tensors in ({"weight": torch.ones(2)}, {"embedding": torch.full((12, 24), torch.nan), "pooled": torch.ones(12)}):
        save_file(tensors, file)
        assert torch.equal(encode([PROMPT])[PROMPT].embedding, first.embedding)


def test_nothing_but_whole_files_is_left(encode, tmp_path):
    encode([PROMPT, ""])
    assert [file.suffix for file in files(tmp_path)] == [".safetensors"] * 2


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tiny_sdxl, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="prompt cache: .* cannot be written"):
        encoded = encode_prompts_sdxl(tiny_sdxl, [PROMPT], cache_dir=tmp_path / "file" / "cache")
    assert encoded[PROMPT].embedding.any()


def test_without_the_cache_nothing_is_read_or_written(encode, tmp_path):
    encode([PROMPT], use_cache=False)
    assert not (tmp_path / "cache").exists()


def test_the_key_is_the_content(encode, tiny_sdxl, tmp_path, no_encoders):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(tiny_sdxl, tmp_path / "moved")
    assert model_fingerprint(copy) == model_fingerprint(tiny_sdxl)
    first = encode([PROMPT])[PROMPT]
    # Other weights of the same shape, other precision, other treatment of "": each a file of its own.
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "token_embedding" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)
    assert not torch.equal(encode([PROMPT], model=copy)[PROMPT].embedding, first.embedding)
    encode([PROMPT], dtype="bf16")
    encode([""])
    encode([""], zero_empty=True)
    assert len(files(tmp_path)) == 5
    no_encoders()
    assert torch.equal(encode([PROMPT])[PROMPT].embedding, first.embedding)


def test_large_files_are_told_apart_by_their_ends(tiny_sdxl, tmp_path):
    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    path = copy / "text_encoder" / "model.safetensors"
    before = model_fingerprint(copy, ends=512)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert model_fingerprint(copy, ends=512) != before


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("PGC_CACHE", raising=False)
    assert default_cache_dir().parts == (".pgc_cache", "prompts")
    monkeypatch.setenv("PGC_CACHE", "/somewhere")
    assert default_cache_dir().parts == ("/", "somewhere", "prompts")


# ---------------------------------------------------------------------------------------------------------------- failures


def test_a_model_without_text_encoders(encode, tiny_sdxl, tmp_path):
    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(PriorError, match="pretrained_model_name_or_path: no folder 'text_encoder_2'"):
        encode([PROMPT], model=copy)


def test_damaged_encoders(encode, tiny_sdxl, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "final_layer_norm" not in name}, path)
    with pytest.raises(PriorError, match="do not fill its config.json: 2 tensors missing, first .*final_layer_norm"):
        encode([PROMPT], model=copy)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(PriorError, match="cannot be loaded"):
        encode([PROMPT], model=copy)


# ---------------------------------------------------------------------------------------------------------------- warnings


def test_known_words_pass_in_silence(encode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(["", "a", "A Red vase, of a CUP", *view_prompts("a zebra vase")])


def test_some_unknown_words(encode):
    with pytest.warns(PromptWarning, match="lacks 'zebr'. 'zebr' -> 'zebra'\\? It knows, among others: .*wooden") as caught:
        encode(["a zebr vase", *view_prompts("a zebr vase")])
    assert len(caught) == 1
    assert not issubclass(caught[0].category, UnknownPromptWords)


def test_only_unknown_words(encode):
    with pytest.warns(UnknownPromptWords, match="NO word of the prompt 'a owl' is in") as caught:
        encode(view_prompts("a owl"))
    assert len(caught) == 1 and "vase" in str(caught[0].message)


def test_a_vocabulary_file_is_the_better_authority(encode, tiny_sdxl, tmp_path):
    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    (copy / "vocabulary.txt").write_text("vase\nowl\n")
    with pytest.warns(PromptWarning, match="lacks 'red'.*among others: vase, owl$"):
        encode([PROMPT], model=copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(["a owl"], model=copy)


def test_a_full_vocabulary_knows_every_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unknown_words(["xyzzy"], None)


def test_what_a_vocabulary_knows(tmp_path):
    from transformers import CLIPTokenizer

    assert known_words(tmp_path, CLIPTokenizer(vocab={str(i): i for i in range(5000)}, merges=[])) is None
    known = known_words(tmp_path, build_tokenizer())
    assert set(WORDS) <= set(known)
    # Nothing merges into this token, so a prompt never contains it.
    vocab = {token: i for i, token in enumerate([*"owl", "l</w>", "owl</w>", "<|startoftext|>", "<|endoftext|>"])}
    assert known_words(tmp_path, CLIPTokenizer(vocab=vocab, merges=[])) == ["l"]


def test_a_cut_prompt_names_what_is_lost(encode):
    long = "a red vase of a green cup of a wooden zebra vase"
    with pytest.warns(PromptWarning, match="is cut at 12 tokens; lost is 'zebra vase'") as caught:
        encoded = encode([long, *view_prompts(long)])
    assert len(caught) == 1
    shorter = "a red vase of a green cup of a wooden"
    assert torch.equal(encoded[long].embedding, encode([shorter])[shorter].embedding)


# ------------------------------------------------------------------------------------------------------------------- views


def test_view_prompts():
    assert view_prompts("a cup") == ["a cup, side view", "a cup, front view", "a cup, back view", "a cup, overhead view"]
    assert DIRECTIONS == ("side", "front", "back", "overhead")


def test_direction_of_no_view():
    assert direction_index(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    "elevation, azimuth, direction",
    [
        (0, 0, "front"),
        (0, 44.9, "front"),
        (0, -44.9, "front"),
        (0, 315.1, "front"),
        (0, 360, "front"),
        (0, 45, "side"),
        (0, 90, "side"),
        (0, -90, "side"),
        (0, 270, "side"),
        (0, 135, "side"),
        (0, 135.1, "back"),
        (0, 180, "back"),
        (0, -180, "back"),
        (0, 224.9, "back"),
        (0, 225, "side"),
        (60, 0, "front"),
        (60.1, 0, "overhead"),
        (89, 180, "overhead"),
        (-80, 0, "front"),
    ],
)
def test_direction_index(elevation, azimuth, direction):
    index = direction_index(torch.tensor([float(elevation)]), torch.tensor([float(azimuth)]))
    assert index.dtype == torch.int64
    assert DIRECTIONS[index.item()] == direction


def test_direction_thresholds():
    index = direction_index(torch.tensor([0.0, 0.0, 40.0]), torch.tensor([50.0, 100.0, 0.0]), front=60, back=85, overhead=30)
    assert [DIRECTIONS[i] for i in index] == ["front", "back", "overhead"]
