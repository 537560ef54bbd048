import json
import shutil
import warnings
import weakref

import pytest
import torch

from tests.diffusion.tiny import MAX_LENGTH, T5_LENGTH, WORDS, build_tiny_sd, build_tiny_sd3, build_tokenizer
from threestudio_pgc.diffusion import prompts
from threestudio_pgc.diffusion.conditioning import (
    make_conditioning,
    make_perp_neg_conditioning,
    perp_neg,
    view_prompts,
)
from threestudio_pgc.diffusion.model_files import MovedModelWarning
from threestudio_pgc.diffusion.prior import PriorError
from threestudio_pgc.diffusion.prompts import (
    PromptWarning,
    UnknownPromptWords,
    default_cache_dir,
    encode_prompts,
    known_words,
    model_fingerprint,
    warn_unknown_words,
)

PROMPT = "a red vase"


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="module")
def tiny_sd3_without_t5(tmp_path_factory):
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3", t5=False)


@pytest.fixture
def encode(tiny_sdxl, tmp_path):
    def run(texts, model=tiny_sdxl, **options):
        return encode_prompts(model, texts, cache_dir=tmp_path / "cache", **options)

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


# ---------------------------------------------------------------------------------------------------------------- families


def assert_equal_to(encoded, texts, encode_with_pipeline):
    """encode_with_pipeline: text -> embedding, negative embedding of "", and both pooled ones or None twice."""
    for text in texts:
        with torch.no_grad():
            embedding, negative, pooled, negative_pooled = encode_with_pipeline(text)
        for item, expected, expected_pooled in ((encoded[text], embedding, pooled), (encoded[""], negative, negative_pooled)):
            torch.testing.assert_close(item.embedding, expected[0], rtol=1e-6, atol=1e-6)
            if expected_pooled is None:
                assert item.pooled is None
            else:
                torch.testing.assert_close(item.pooled, expected_pooled[0], rtol=1e-6, atol=1e-6)


def test_stable_diffusion_equals_its_pipelines_own_encoding(encode, tiny_sd):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    texts = [PROMPT, "a zebra cup, overhead view", ""]

    def encode_with_pipeline(text):
        return *pipeline.encode_prompt(text, "cpu", 1, True, negative_prompt=""), None, None

    encoded = encode(texts, model=tiny_sd)
    assert_equal_to(encoded, texts, encode_with_pipeline)
    assert encoded[PROMPT].embedding.shape == (MAX_LENGTH, 8)
    assert encoded[""].embedding.any()


def test_an_encoder_that_masks_its_padding_is_asked_so(encode, tiny_sd, tmp_path):
    from diffusers import StableDiffusionPipeline

    model = shutil.copytree(tiny_sd, tmp_path / "model")
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    (model / "text_encoder" / "config.json").write_text(json.dumps(config | {"use_attention_mask": True}))
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    expected, _ = pipeline.encode_prompt(PROMPT, "cpu", 1, False)
    masked = encode([PROMPT], model=model)[PROMPT].embedding
    torch.testing.assert_close(masked, expected[0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(masked, encode([PROMPT], model=tiny_sd)[PROMPT].embedding)


def test_stable_diffusion_3_equals_its_pipelines_own_encoding(encode, tiny_sd3):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    texts = [PROMPT, "a zebra cup, overhead view", ""]

    def encode_with_pipeline(text):
        return pipeline.encode_prompt(text, text, text, device="cpu", negative_prompt="", max_sequence_length=T5_LENGTH)

    encoded = encode(texts, model=tiny_sd3)
    assert_equal_to(encoded, texts, encode_with_pipeline)
    assert encoded[PROMPT].embedding.shape == (MAX_LENGTH + T5_LENGTH, 32) and encoded[PROMPT].pooled.shape == (20,)
    assert not encoded[PROMPT].embedding[:MAX_LENGTH, 24:].any() and encoded[PROMPT].embedding[MAX_LENGTH:].any()


def test_stable_diffusion_3_without_t5_has_zeros_in_its_place(encode, tiny_sd3_without_t5):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_without_t5, text_encoder_3=None, tokenizer_3=None)

    def encode_with_pipeline(text):
        return pipeline.encode_prompt(text, text, text, device="cpu", negative_prompt="")

    encoded = encode([PROMPT, ""], model=tiny_sd3_without_t5)
    assert_equal_to(encoded, [PROMPT], encode_with_pipeline)
    assert encoded[PROMPT].embedding.shape == (MAX_LENGTH + 256, 32) and not encoded[PROMPT].embedding[MAX_LENGTH:].any()


def test_a_third_encoder_that_is_listed_has_to_be_there(encode, tiny_sd3, tmp_path):
    model = shutil.copytree(tiny_sd3, tmp_path / "model")
    shutil.rmtree(model / "text_encoder_3")
    with pytest.raises(PriorError, match="pretrained_model_name_or_path: no folder 'text_encoder_3'"):
        encode([PROMPT], model=model)


def test_t5_in_half_precision_keeps_in_float32_what_overflows(tiny_sd3):
    third = prompts._encoders(tiny_sd3)[2]
    encoder = prompts._load_encoder(third, tiny_sd3, torch.device("cpu"), torch.float16)
    wide = [name for name, parameter in encoder.named_parameters() if parameter.dtype == torch.float32]
    assert len(wide) == 2 and all(name.endswith("DenseReluDense.wo.weight") for name in wide)


def test_a_model_that_takes_a_picture_is_refused(encode, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Zero123Pipeline"}))
    with pytest.raises(PriorError, match="is a zero123 model, which takes a picture, not a prompt; wanted one of sd, sdxl, sd3"):
        encode([PROMPT], model=tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(PriorError, match="is a PixArtAlphaPipeline, wanted one of StableDiffusionXL"):
        encode([PROMPT], model=tmp_path)


def test_zeros_for_the_empty_prompt_are_sdxls_alone(encode, tiny_sd, tiny_sd3):
    for model, family in ((tiny_sd, "sd"), (tiny_sd3, "sd3")):
        with pytest.raises(PriorError, match=f"zero_empty: found true for .*, a {family} model, wanted null or false"):
            encode([""], model=model, zero_empty=True)
        assert encode([""], model=model, zero_empty=False)[""].embedding.any()


def test_the_cache_holds_every_family(encode, tiny_sd, tiny_sd3, tiny_sd3_without_t5, tmp_path, no_encoders):
    models = [tiny_sd, tiny_sd3, tiny_sd3_without_t5]
    first = [encode([PROMPT], model=model)[PROMPT] for model in models]
    assert len(files(tmp_path)) == 3
    no_encoders()
    for model, item in zip(models, first):
        again = encode([PROMPT], model=model)[PROMPT]
        assert torch.equal(again.embedding, item.embedding)
        assert (again.pooled is None) == (item.pooled is None) == (model is tiny_sd)


def test_a_moved_id_is_told_of_once(encode, tiny_sd, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    shutil.copytree(tiny_sd, repo / "snapshots" / "c0ffee")
    with pytest.warns(MovedModelWarning, match="'stable-diffusion-v1-5/stable-diffusion-v1-5', a copy, is used instead") as caught:
        found = encode([PROMPT], model="runwayml/stable-diffusion-v1-5")
    assert len(caught) == 1
    assert torch.equal(found[PROMPT].embedding, encode([PROMPT], model=tiny_sd)[PROMPT].embedding)


# ------------------------------------------------------------------------------------------------------------ conditioning


def test_conditioning_of_views(encode):
    encoded = encode([*view_prompts(PROMPT), "", "cup"])
    chosen = [view_prompts(PROMPT)[index] for index in (1, 0, 1)]
    conditioning = make_conditioning(encoded, chosen)
    assert conditioning.cond.shape == conditioning.uncond.shape == (3, MAX_LENGTH, 24)
    assert conditioning.pooled_cond.shape == conditioning.pooled_uncond.shape == (3, 12)
    assert conditioning.negatives is conditioning.pooled_negatives is conditioning.negative_weights is None
    for view, text in enumerate(chosen):
        assert torch.equal(conditioning.cond[view], encoded[text].embedding)
        assert torch.equal(conditioning.pooled_cond[view], encoded[text].pooled)
        assert torch.equal(conditioning.uncond[view], encoded[""].embedding)
    assert torch.equal(make_conditioning(encoded, chosen, ["", "cup", ""]).pooled_uncond[1], encoded["cup"].pooled)
    with pytest.raises(ValueError, match="found 2 negative prompts for 3 prompts"):
        make_conditioning(encoded, chosen, ["", ""])


def test_negatives_of_their_own(encode):
    encoded = encode([PROMPT, "", "cup"])
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    conditioning = make_conditioning(encoded, [PROMPT] * 2, "", [["cup", ""], [PROMPT, "cup"]], weights)
    assert conditioning.negatives.shape == (2, 2, MAX_LENGTH, 24) and conditioning.pooled_negatives.shape == (2, 2, 12)
    for n, row in enumerate((["cup", ""], [PROMPT, "cup"])):
        for view, text in enumerate(row):
            assert torch.equal(conditioning.negatives[n, view], encoded[text].embedding)
            assert torch.equal(conditioning.pooled_negatives[n, view], encoded[text].pooled)
    assert conditioning.negative_weights is weights
    with pytest.raises(ValueError, match="found 1 negative prompts for 2 prompts"):
        make_conditioning(encoded, [PROMPT] * 2, "", [["cup"]])
    with pytest.raises(ValueError, match="negative_weights: found shape \\(2, 2\\), wanted \\(1, 2\\)"):
        make_conditioning(encoded, [PROMPT] * 2, "", [["cup"] * 2], weights)


def test_conditioning_without_pooled_embeddings(encode, tiny_sd):
    encoded = encode([PROMPT, ""], model=tiny_sd)
    conditioning = make_conditioning(encoded, [PROMPT], "", [[""]])
    assert conditioning.pooled_cond is conditioning.pooled_uncond is conditioning.pooled_negatives is None
    assert torch.equal(conditioning.negatives[0], conditioning.uncond)


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
        encoded = encode_prompts(tiny_sdxl, [PROMPT], cache_dir=tmp_path / "file" / "cache")
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


@pytest.mark.parametrize(
    "which, wanted", [("tokenizer", "tokenizer.json or vocab.json"), ("tokenizer_3", "tokenizer.json; spiece.model alone")]
)
def test_a_tokenizer_without_a_vocabulary(encode, tiny_sd3, tmp_path, which, wanted):
    copy = shutil.copytree(tiny_sd3, tmp_path / "copy")
    (copy / which / "tokenizer.json").unlink()
    with pytest.raises(PriorError, match=f"the tokenizer in {copy}/{which} has no vocabulary, wanted {wanted}"):
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


def test_the_shortest_encoder_says_what_is_cut(encode, tiny_sd3):
    with pytest.warns(PromptWarning, match="is cut at 12 tokens by the shortest of the text encoders; lost is 'zebra vase'") as caught:
        encode(["a red vase of a green cup of a wooden zebra vase"], model=tiny_sd3)
    assert len(caught) == 1


@pytest.mark.parametrize("pooled", [True, False])
def test_perp_neg_conditioning(encode, tiny_sd, tiny_sdxl, pooled):
    views = view_prompts(PROMPT)
    encoded = encode([*views, "cup"], model=tiny_sdxl if pooled else tiny_sd)
    elevation, azimuth = torch.tensor([0.0, 0.0, 80.0]), torch.tensor([22.5, 180.0, 0.0])
    found = make_perp_neg_conditioning(encoded, views, "cup", elevation, azimuth)
    side, front, back, overhead = (encoded[view] for view in views)
    mixtures = [
        [0.75 * of_front + 0.25 * of_side if of_front is not None else None for of_front, of_side in zip(front, side)],
        back,
        overhead,
    ]
    for view, (embedding, vector) in enumerate(mixtures):
        torch.testing.assert_close(found.cond[view], embedding)
        if pooled:
            torch.testing.assert_close(found.pooled_cond[view], vector)
        for n, negative in enumerate((front, side)):
            assert torch.equal(found.negatives[n, view], negative.embedding)
            assert not pooled or torch.equal(found.pooled_negatives[n, view], negative.pooled)
        assert torch.equal(found.uncond[view], encoded["cup"].embedding)
    assert torch.equal(found.negative_weights, perp_neg(elevation, azimuth).away)
    if not pooled:
        assert found.pooled_cond is found.pooled_uncond is found.pooled_negatives is None
