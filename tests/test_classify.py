"""Likelihoods of labels against Transformers and against training's own cutting; figures worked by hand; bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from transformers import AutoModelForImageTextToText, AutoProcessor

import pumice
import tiny
from pumice import Calibration, Labelling, Question, UserError, calibrate
from pumice.classification import MAX_LABELS
from pumice.model import Model
from pumice.prompt import TEMPLATES, Message, Part, render
from pumice.question import Prompter
from pumice.tasks.calibration import Fit, fitted, nll, read_labelled
from pumice.tokenizer import Tokenizer
from test_cli import Command, command, refused  # noqa: F401 (a fixture)

TEXTS = ["red", "a red circle", "Square.", "two\nlines", "is 3", "ünder"]
COLOURS = {"red": "#d62828", "blue": "#2854d6", "green": "#26943c"}
ASKED = "What colour is it?"


def photo(size: tuple[int, int] = (70, 45)) -> Image.Image:
    picture = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture))


def disc(colour: str) -> Image.Image:
    picture = Image.new("RGB", (300, 300), (236, 224, 204))
    ImageDraw.Draw(picture).ellipse((70, 60, 230, 220), fill=colour)
    return picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A tiny model by family and language model."""
    place, made = tmp_path_factory.mktemp("classify"), {}

    def folder(family: str, lm: str) -> Path:
        if (family, lm) not in made:
            made[family, lm] = tiny.hf_folder(place / f"{family}-{lm}", family=family, lm=lm, seed=5)
        return made[family, lm]

    return folder


@pytest.fixture(scope="module")
def model(folders: Callable[[str, str], Path]) -> Model:
    return pumice.load(folders("1.6", "vicuna"))


@pytest.fixture(scope="module")
def pebble() -> Model:
    return pumice.load("pebble:1.5")


# --- likelihoods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lm", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("family", ["1.5", "1.6"])
def test_transformers_gives_the_same_likelihoods(folders: Callable[[str, str], Path], family: str, lm: str) -> None:
    """Of the whole text, prompt and answer in one piece, in one pass over all of it."""
    folder, image = folders(family, lm), photo()
    model, processor = pumice.load(folder), AutoProcessor.from_pretrained(folder)
    oracle = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tiny.LANGUAGE_MODELS[lm].prompt(1, "What is shown?")
    before = processor(images=[image], text=prompt, return_tensors="pt")["input_ids"].shape[1]
    texts = [text if prompt.endswith("\n") else f" {text}" for text in TEXTS]
    found = model.log_likelihoods(Question(prompt, image, raw=True), texts)
    for text, ours in zip(texts, found):
        inputs = processor(images=[image], text=prompt + text, return_tensors="pt")
        with torch.inference_mode():
            scores_TV = oracle(**inputs).logits[0].double().log_softmax(-1)
        ids = inputs["input_ids"][0]
        theirs = scores_TV[before - 1 : -1].gather(1, ids[before:, None])[:, 0]
        assert ours == pytest.approx(theirs.tolist(), abs=2e-4), text
        assert len(ours) == len(ids) - before


def test_an_answer_of_all_tokens_sums_to_one(model: Model) -> None:
    """Over the whole vocabulary the first token is one of them."""
    question = Question("What is it?", photo())
    seen = model.see(question)
    text = next(text for text in "abcdefgh" if len(model.written(question, seen, [text])[0]) == 1)
    (found,) = model.log_likelihoods(question, [text])
    scores_1V = model.logits(seen.encoded.ids, model.features(seen.images), 1)
    (token,) = model.written(question, seen, [text])[0]
    assert found == [pytest.approx(math.log(float(scores_1V[0].softmax(-1)[token])), abs=1e-5)]


def _phi_like(folder: Path, place: Path) -> Tokenizer:
    """Special tokens that take the white space behind them, as Phi-3's do."""
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens([AddedToken(word, rstrip=True) for word in ("<|user|>", "<|assistant|>", "<|end|>")])
    library.save(str(place))
    return Tokenizer.from_json(place)


@pytest.mark.parametrize("lm", [*tiny.LANGUAGE_MODELS, "phi"])
@pytest.mark.parametrize("template", sorted({each.name for each in TEMPLATES.values()} - {"plain", "hf_llama3"}))
def test_an_answer_is_cut_as_training_cuts_it(
    folders: Callable[[str, str], Path], tmp_path: Path, template: str, lm: str
) -> None:
    """The ids of a whole conversation, as training renders it, go on with those of the answer."""
    if lm == "phi":
        loaded, tokenizer = pumice.load(folders("1.5", "vicuna")), _phi_like(folders("1.5", "vicuna"), tmp_path / "t")
    else:
        loaded = pumice.load(folders("1.5", lm))
        tokenizer = loaded.tokenizer
    prompter = Prompter("x", dataclasses.replace(loaded.config, template=template), tokenizer)
    question = Question("What is it?", photo())
    seen = prompter.see(question)
    for text, ids in zip(TEXTS, prompter.written(question, seen, TEXTS)):
        whole = render(template, [Message("user", "What is it?", 1), Message("assistant", text)])
        trained = tokenizer.encode(whole, [seen.images[0].grid.tokens], image_id=loaded.config.image_token_id).ids
        both = [*seen.encoded.ids, *ids]
        assert trained[: len(both)] == both
        assert tokenizer.decode(ids).strip() == text


def test_the_space_in_front_is_the_template_s(model: Model) -> None:
    spaces = {name: TEMPLATES[name].answer_space for name in ("vicuna_v1", "chatml_direct", "hf_llama3", "hf_mistral")}
    assert spaces == {"vicuna_v1": " ", "chatml_direct": "", "hf_llama3": "", "hf_mistral": " "}


def test_a_text_that_the_prompt_s_end_would_swallow_is_cut_by_itself(model: Model) -> None:
    """A raw prompt that ends with a space: the tokenizer would join it with the word behind it."""
    question = Question("the si", raw=True)
    seen = model.see(question)
    assert model.tokenizer.encode([Part("text", "the sign")], [], image_id=-1).ids[: len(seen.encoded.ids)] != (
        seen.encoded.ids
    )
    assert model.written(question, seen, ["gn"]) == [model.tokenizer.continued("gn")]


@pytest.mark.parametrize(("texts", "words"), [([""], "''"), ([3], "3"), (["x" * 9000], "room|positions")])
def test_texts_that_have_no_likelihood(model: Model, texts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.log_likelihoods(Question("What?"), texts)


def test_a_text_whose_tokens_the_weights_do_not_have(model: Model) -> None:
    """A vocabulary larger than the weights: joined letters lie at its end."""
    config = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, vocab=293))
    small, question = Prompter("small", config, model.tokenizer), Question("ö", raw=True)
    seen = small.see(question)
    assert small.written(question, seen, ["ü"])
    with pytest.raises(UserError, match=r"the answer 'sign' holds token .* has 293"):
        small.written(question, seen, ["sign"])


def test_a_text_that_the_prompt_s_last_token_takes(folders: Callable[[str, str], Path], tmp_path: Path) -> None:
    """It has no token, so it would be certain."""
    loaded, tokenizer = pumice.load(folders("1.5", "vicuna")), _phi_like(folders("1.5", "vicuna"), tmp_path / "t")
    prompter = Prompter("x", dataclasses.replace(loaded.config, template="phi3"), tokenizer)
    question = Question("What?")
    with pytest.raises(UserError, match="no token"):
        prompter.written(question, prompter.see(question), ["cat", "\n "])


def test_the_last_position_is_an_answer_s_too(model: Model) -> None:
    question = Question("What?")
    seen = model.see(question)
    room = model.config.text.max_positions - len(seen.encoded.ids)
    texts = ["ö" * (count // 2) for count in (room - 2, room + 2)]  # two bytes each, and each byte a token
    assert len(model.written(question, seen, texts[:1])[0]) <= room
    with pytest.raises(UserError, match="positions behind the prompt"):
        model.written(question, seen, texts[1:])


# --- from likelihoods to probabilities --------------------------------------------------------------------------------


def of(labelling: Labelling, found: list[list[float]], prior: list[list[float]] | None = None) -> dict[str, float]:
    return dict(labelling.classification(found, prior, 0.0))


FOUND = [[-1.0, -1.0, -2.0], [-3.0]]
"""-4 over three tokens of 6 bytes, -3 over one of 2."""
PRIOR = [[-1.0, -1.0, -3.0], [-0.5]]
BY_HAND = [
    ({}, None, -4 + 3),
    ({"normalise": "tokens"}, None, -4 / 3 + 3),
    ({"normalise": "bytes"}, None, -4 / 6 + 3 / 2),
    ({"temperature": 2.0}, None, (-4 + 3) / 2),
    ({"prior": True}, PRIOR, (-4 + 5) - (-3 + 0.5)),
    ({"prior": True, "normalise": "tokens", "temperature": 0.5}, PRIOR, ((-4 + 5) / 3 - (-3 + 0.5)) / 0.5),
]


@pytest.mark.parametrize(("choices", "prior", "lead"), BY_HAND)
def test_probabilities_worked_by_hand(choices: dict, prior: list[list[float]] | None, lead: float) -> None:
    """Of two labels the first has the probability 1 / (1 + e^-lead)."""
    labelling = Labelling({"first": "öööa"[1:] + "b", "second": "cd"}, **choices)
    assert [len(each.encode()) for each in labelling.answers] == [6, 2]
    found = labelling.classification(FOUND, prior, 0.25)
    assert found["first"] == pytest.approx(1 / (1 + math.exp(-lead)), rel=1e-12)
    assert sum(found.values()) == pytest.approx(1)
    assert list(found) == (["first", "second"] if lead > 0 else ["second", "first"])
    assert found.label == found.scored[0].label == next(iter(found))
    assert {each.label: (each.log_likelihood, each.tokens) for each in found.scored} == {
        "first": (-4.0, 3), "second": (-3.0, 1),
    }  # fmt: skip
    assert (len(found), found.seconds) == (2, 0.25)


def test_answers_of_one_label_add_up() -> None:
    """A quarter and a half against a quarter; the tokens are those of the likelier."""
    labelling = Labelling({"cat": ["a cat", "Cat"], "dog": "dog"})
    found = labelling.classification([[math.log(0.5), math.log(0.5)], [math.log(0.5)], [math.log(0.25)]], None, 0.0)
    assert dict(found) == {"cat": pytest.approx(0.75), "dog": pytest.approx(0.25)}
    assert found.scored[0].log_likelihood == pytest.approx(math.log(0.75))
    assert found.scored[0].tokens == 1


def test_plain_labels_are_spelt_with_a_capital_too() -> None:
    assert Labelling(["cat", "Dog", "4x"]).answers == ["cat", "Cat", "Dog", "4x"]
    assert Labelling(("cat", "dog")) == Labelling({"cat": ("cat", "Cat"), "dog": ["dog", "Dog"]})


@pytest.mark.parametrize(("below", "label"), [(0.0, "b"), (0.73, "b"), (0.74, None), (1.0, None)])
def test_a_small_probability_abstains(below: float, label: str | None) -> None:
    labelling = Labelling({"a": "a", "b": "b"}, abstain_below=below)
    found = labelling.classification([[-2.0], [-1.0]], None, 0.0)
    assert (found.label, found["b"]) == (label, pytest.approx(0.7310585786))


def test_a_label_that_cannot_be_and_scores_that_are_none() -> None:
    labelling = Labelling({"a": "a", "b": "b"})
    assert of(labelling, [[-math.inf], [-1.0]]) == {"b": 1.0, "a": 0.0}
    assert of(dataclasses.replace(labelling, temperature=1e-300), [[-2.0], [-1.0]]) == {"b": 1.0, "a": 0.0}
    for wrong in ([[math.nan], [-1.0]], [[-1.0], [math.nan]], [[-math.inf], [-math.inf]]):
        with pytest.raises(UserError, match="no numbers"):
            of(labelling, wrong)


def test_what_is_asked() -> None:
    assert (
        Labelling(["cat", "dog", "rabbit"]).question(None).prompt == "What is shown in this image: cat, dog or rabbit?"
    )
    many = Labelling([f"animal {number}" for number in range(50)])
    assert many.question(None).prompt == "What is shown in this image?"
    own = Labelling(["cat", "dog"], "Which?", "Be brief.", 64).question("pet.jpg")
    assert (own.prompt, own.system, own.image, own.image_tokens) == ("Which?", "Be brief.", "pet.jpg", 64)


# --- a model's labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", COLOURS)
def test_pebble_picks_the_colour(pebble: Model, colour: str) -> None:
    found = pebble.classify(disc(COLOURS[colour]), list(COLOURS), prompt=ASKED)
    assert (found.label, next(iter(found))) == (colour, colour)
    assert found[colour] > 0.9


def test_why_a_label_is_spelt_with_a_capital_too(pebble: Model) -> None:
    """pebble was taught to say `Red.` It would never begin with `red`; how the answer goes on does not matter."""
    small, large = pebble.log_likelihoods(Question(ASKED, disc(COLOURS["red"])), ["red", "Red"])
    assert sum(small) < -10 < -0.1 < sum(large)


def test_pebble_picks_the_shape_without_a_prompt() -> None:
    folder = Path(__file__).parent.parent / "docs" / "images"
    pebble = pumice.load("pebble")
    labels = ["circle", "square", "triangle", "star", "cross", "ring"]
    assert pebble.classify(folder / "star.png", labels).label == "star"
    assert pebble.classify(folder / "shapes.png", labels).label == "circle"


def test_the_prior_is_that_of_a_picture_of_one_colour(pebble: Model) -> None:
    """Each of two pictures painted over in its own size; a label that is likely anyway loses its lead."""
    labelling = Labelling({"red": "Red.", "blue": "Blue."}, ASKED, prior=True)
    pictures = [disc(COLOURS["red"]), disc(COLOURS["blue"]).resize((200, 100))]
    mean = tuple(int(255 * each) for each in (0.48145466, 0.4578275, 0.40821073))
    empty = [Image.new("RGB", each.size, mean) for each in pictures]
    plain = pebble.log_likelihoods(Question(ASKED, pictures), ["Red.", "Blue."])
    prior = pebble.log_likelihoods(Question(ASKED, empty), ["Red.", "Blue."])
    found = pebble.classify(pictures, labelling)
    for place, each in enumerate(sorted(found.scored, key=lambda each: each.label, reverse=True)):
        assert each.log_likelihood == pytest.approx(sum(plain[place]), abs=1e-4)
        assert each.prior == pytest.approx(sum(prior[place]), abs=1e-4)
        assert each.score == pytest.approx(sum(plain[place]) - sum(prior[place]), abs=2e-4)
    on_nothing = pebble.classify(empty[0], labelling)
    assert dict(on_nothing) == {"red": pytest.approx(0.5, abs=1e-4), "blue": pytest.approx(0.5, abs=1e-4)}


def test_settings_come_with_a_labelling(pebble: Model) -> None:
    red, labelling = disc(COLOURS["red"]), Labelling(["red", "blue"], ASKED)
    warm = pebble.classify(red, dataclasses.replace(labelling, temperature=50.0, abstain_below=0.9))
    assert warm.label is None
    assert list(warm) == ["red", "blue"]
    assert 0.5 < warm["red"] < pebble.classify(red, labelling)["red"]
    with pytest.raises(UserError, match="has its own"):
        pebble.classify(red, labelling, prompt="And now?")
    with pytest.raises(UserError, match="without a picture"):
        pebble.classify(None, dataclasses.replace(labelling, prior=True))
    assert len(pebble.classify(None, labelling)) == 2


LONG = "word " * 10_000


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "number of labels is 0;"),
        (["cat"], "number of labels is 1;"),
        (["cat", "dog", "cat"], "'cat' came twice"),
        (["cat", "Cat"], "same answer 'Cat'"),
        ({"cat": "It is", "dog": "It is"}, "same answer"),
        ({"cat": ["A cat", "A cat."], "dog": "A dog"}, "begin with 'A cat'"),
        ({"cat": [], "dog": "A dog"}, "has the answers"),
        ({"cat": 3, "dog": "A dog"}, "has the answers"),
        ({"cat": ["A cat", None], "dog": "A dog"}, "an answer of the label 'cat'"),
        (["cat", ""], "label is ''"),
        (["cat", " dog"], "' dog'"),
        (["cat", 3], "label is 3"),
        (["cat", ["dog"]], "label is"),
        ("cat", "neither a list"),
        (3, "neither a list"),
        ([f"label {number}" for number in range(10**5)], f"labels is 100000; 2 to {MAX_LABELS}"),
        ([f"{number} {'x' * 100}" for number in range(9000)], "characters"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be(labels: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Labelling(labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"normalise": "words"}, "normalise is 'words'"),
        ({"prior": 1}, "prior is 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"abstain_below": 1.5}, "abstain_below is 1.5"),
        ({"abstain_below": math.nan}, "abstain_below is nan"),
    ],
)
def test_settings_that_cannot_be(choices: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Labelling(["cat", "dog"], **choices)


def test_labels_longer_than_the_context(pebble: Model) -> None:
    with pytest.raises(UserError, match="positions"):
        pebble.classify(None, {"cat": LONG.strip(), "dog": "dog"}, prompt="Which?")
    with pytest.raises(UserError, match="half of a character pair"):
        pebble.classify(None, ["cat", "\ud800"], prompt="Which?")


# --- calibration ------------------------------------------------------------------------------------------------------


def test_a_temperature_worked_by_hand() -> None:
    """Two labels that always lie 2 apart, and three pictures of four right: then e^(2/T) must be 3."""
    scores_NL, truth_N = torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    temperature = fitted(scores_NL, truth_N)
    assert temperature == pytest.approx(2 / math.log(3), rel=1e-6)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert Fit.of(scores_NL, truth_N, temperature) == Fit(pytest.approx(entropy), pytest.approx(0, abs=1e-6))
    sure = 1 / (1 + math.exp(-2))
    before = Fit.of(scores_NL, truth_N, 1.0)
    assert before.ece == pytest.approx(sure - 0.75)
    assert before.nll == pytest.approx(-(0.75 * math.log(sure) + 0.25 * math.log(1 - sure)))


def test_the_temperature_has_the_least_loss() -> None:
    torch.manual_seed(0)
    scores_NL = 3 * torch.randn(200, 5)
    truth_N = torch.distributions.Categorical(logits=scores_NL / 2.5).sample()
    temperature = fitted(scores_NL, truth_N)
    assert 1.8 < temperature < 3.5
    around = [nll(scores_NL, truth_N, temperature * share) for share in (0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0)]
    assert min(around) == around[3]


def test_a_calibration_error_worked_by_hand() -> None:
    """Bins of a fifteenth, each with its upper end: 0.6 and 0.55 share one, 0.9 and 1.0 lie alone."""
    probabilities = [(0.6, 1), (0.55, 0), (0.9, 1), (1.0, 0)]
    scores_NL = torch.tensor(
        [[math.log(p), math.log(max(1 - p, 1e-300))] for p, _ in probabilities], dtype=torch.float64
    )
    truth_N = torch.tensor([0 if right else 1 for _, right in probabilities])
    by_hand = (abs(0.6 + 0.55 - 1) + abs(0.9 - 1) + abs(1.0 - 0)) / 4
    assert Fit.of(scores_NL, truth_N, 1.0).ece == pytest.approx(by_hand, abs=1e-9)


def test_where_all_are_right_their_number_says_how_sure_to_be() -> None:
    """Three of three: the next is right in four of five cases, and e^(2/T) must be 4."""
    scores_NL, truth_N = torch.tensor([[2.0, 0.0], [0.0, 2.0], [5.0, 3.0]]), torch.tensor([0, 1, 0])
    assert fitted(scores_NL, truth_N) == pytest.approx(2 / math.log(4), rel=1e-6)
    small_NL = scores_NL / 100  # such as the mean of many tokens: less sure than it should be
    assert fitted(small_NL, truth_N) == pytest.approx(0.02 / math.log(4), rel=1e-6)


def test_scores_that_have_nothing_to_do_with_the_labels() -> None:
    with pytest.raises(UserError, match="say nothing about the labels"):
        fitted(torch.tensor([[2.0, 0.0]] * 3), torch.tensor([1, 1, 1]))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Four discs, the last with a label that is not true, so that being sure has a price."""
    lines = ["label,image"]
    for number, (name, said) in enumerate([("red", "red"), ("blue", "blue"), ("green", "green"), ("red", "blue")]):
        disc(COLOURS[name]).save(tmp_path / f"{number}, disc.png")
        lines.append(f'{said},"{number}, disc.png"')
    path = tmp_path / "discs.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_calibration_is_fitted_kept_and_used(pebble: Model, labelled: Path, tmp_path: Path) -> None:
    labelling = Labelling(list(COLOURS), ASKED, normalise="tokens", temperature=3.0, abstain_below=0.2)
    heard: list[tuple[str, int, int]] = []
    found = calibrate(pebble, labelling, labelled, told=lambda *each: heard.append(each))
    assert heard == [("classifying", done, 4) for done in range(4)]
    assert (found.pictures, found.accuracy) == (4, 0.75)
    assert found.labelling == dataclasses.replace(labelling, temperature=found.labelling.temperature)
    assert found.labelling.temperature > 1
    assert found.after.nll < found.before.nll
    assert found.after.ece < found.before.ece
    found.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    assert again == found
    red = disc(COLOURS["red"])
    warm, plain = (
        pebble.classify(red, again.labelling),
        pebble.classify(red, dataclasses.replace(labelling, temperature=1)),
    )
    exponents = [each.score / again.labelling.temperature for each in plain.scored]
    assert list(warm.values()) == pytest.approx(torch.tensor(exponents).softmax(-1).tolist(), abs=1e-5)

    as_lines = tmp_path / "discs.jsonl"
    rows = read_labelled(labelled, list(COLOURS))
    as_lines.write_text(
        "".join(json.dumps({"image": image.name, "label": label}) + "\n\n" for image, label in rows), encoding="utf-8"
    )
    assert calibrate(pebble, labelling, as_lines) == found


def test_a_calibration_is_kept_to_the_bit(tmp_path: Path) -> None:
    labelling = Labelling({"ünder": ["A\nB", "C"], "b": "D"}, "Two\nlines\t", "", 64, "bytes", True, 1 / 3, 0.1)
    made = Calibration(labelling, "a model", 4, 2 / 3, Fit(0.1 + 0.2, 0.0), Fit(1e-300, 1.0))
    made.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == made


def test_a_calibration_is_only_good_for_what_it_was_made_of() -> None:
    labelling = Labelling(["red", "blue"], ASKED, temperature=2.0)
    made = Calibration(labelling, "pebble", 4, 0.75, Fit(1.0, 0.1), Fit(0.9, 0.05))
    same = {"labels": ["blue", "red"], "prompt": ASKED, "normalise": "none", "prior": False, "temperature": 2.0}
    assert made.under(same, "pebble") == labelling
    assert list(made.under(same, "models/pebble").labels) == ["red", "blue"]
    for other in ("pebble:1.5", "models/llava"):
        with pytest.raises(UserError, match=f"the model is {other}, and the calibration was made with pebble"):
            made.under(same, other)
    assert made.under({"abstain_below": 0.5}, "pebble") == dataclasses.replace(labelling, abstain_below=0.5)
    for name, other in (
        ("labels", ["red", "green"]), ("prompt", "Which?"), ("system", "Be brief."), ("normalise", "bytes"),
        ("prior", True), ("temperature", 1.0), ("image_tokens", 64),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{name} is .* was made with"):
            made.under({name: other}, "pebble")


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("normalise", "words"), ("labels", {"red": []}), ("labels", 3), ("prior", None), ("more", 1)],
)
def test_a_damaged_calibration(tmp_path: Path, name: str, value: object) -> None:
    made = Calibration(Labelling(["red", "blue"]), "pebble", 4, 0.75, Fit(1.0, 0.1), Fit(0.9, 0.05))
    path = tmp_path / "c.json"
    whole = json.loads(made.to_json())
    path.write_text(json.dumps(whole | {"labelling": whole["labelling"] | {name: value}}), encoding="utf-8")
    with pytest.raises(UserError):
        Calibration.load(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"labelling": 1}', "[" * 100_000, '{"before": {"nll": "x"}}', "\x00"], ids=range(7)
)
def test_what_is_no_calibration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="no calibration"):
        Calibration.load(path)


def test_figures_of_a_calibration_are_numbers(tmp_path: Path) -> None:
    made = Calibration(Labelling(["red", "blue"]), "pebble", 4, 0.75, Fit(1.0, 0.1), Fit(0.9, 0.05))
    for name, value in (("pictures", "4"), ("accuracy", None), ("before", {"nll": "1", "ece": 0.0}), ("model", 7)):
        path = tmp_path / "c.json"
        path.write_text(json.dumps(json.loads(made.to_json()) | {name: value}), encoding="utf-8")
        with pytest.raises(UserError, match="no calibration"):
            Calibration.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with ''"),
        ("image,label\n", "no labelled pictures"),
        ("a.png,red\n", "begins with 'a.png,red'"),
        ("image;label\na.png;red\n", "begins with 'image;label'"),
        ("image,label\na.png,red\na.png,rde\n", "line 3 of x.csv has the label 'rde'"),
        ("image,label\na.png,red\nb.png,red\n", "line 3 of x.csv names the picture 'b.png'"),
        ("image,label\na.png\n", "line 2 of x.csv has no image and label"),
        ("image,label\n,red\n", "line 2 of x.csv has no image and label"),
        ('image,label\n"a.png,red\n', "no CSV file"),
        ("image,label\n" + "x" * 5000 + ",red\n", "which is not there"),
        ('{"image": "a.png", "label": "red"}\n{"image": "a.png"}\n', "line 2 of x.csv has no image"),
        ('{"image": "a.png", "label": "red"}\n{"image"\n', "line 2 of x.csv has no image"),
        ('{"image": "a.png", "label": "red"}\n' + "[" * 100_000, "line 2 of x.csv has no image"),
        ('{"image": 3, "label": "red"}\n', "line 1 of x.csv has no image"),
    ],
    ids=range(14),
)
def test_labelled_files_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    disc(COLOURS["red"]).save(tmp_path / "a.png")
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        list(read_labelled(path, list(COLOURS)))


def test_a_labelled_file_from_a_spreadsheet(tmp_path: Path) -> None:
    """A byte order mark, line ends of Windows, a column more, a line without anything."""
    disc(COLOURS["red"]).save(tmp_path / "a.png")
    path = tmp_path / "x.csv"
    path.write_bytes("\ufeffimage,who,label\r\na.png,me,red \r\n\r\na.png,you,blue\r\n".encode())
    assert list(read_labelled(path, list(COLOURS))) == [(tmp_path / "a.png", "red"), (tmp_path / "a.png", "blue")]


def test_labelled_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"image,label\n\xff\xfe,red\n")
    (tmp_path / "large").write_bytes(b" " * (2**24 + 1))
    for name, words in (("latin", "not UTF-8"), ("large", "more than"), ("none", "No such file"), (".", "directory")):
        with pytest.raises(UserError, match=words):
            list(read_labelled(tmp_path / name, ["red"]))


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def discs(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("red", "blue")]
    for path in paths:
        disc(COLOURS[path.stem]).save(path)
    return paths


def test_a_line_for_each_image(command: Command, discs: list[Path], tmp_path: Path) -> None:  # noqa: F811
    asked = ["classify", "pebble:1.5", *discs, "--prompt", ASKED]
    done = command(*asked, "--labels", "red, blue,green")
    assert (done.code, done.err) == (0, "")
    first, second = done.out.splitlines()
    assert first.startswith(f"{discs[0]}: red (red 1.00, ")
    assert second.startswith(f"{discs[1]}: blue (blue ")
    facts = [json.loads(line) for line in command(*asked, "--labels", "red,blue,green", "--json").out.splitlines()]
    assert [each["label"] for each in facts] == ["red", "blue"]
    assert sum(facts[0]["probabilities"].values()) == pytest.approx(1)
    assert facts[0].keys() == {"image", "label", "probabilities", "log_likelihoods", "priors", "tokens", "seconds"}
    assert facts[0]["priors"] == {}
    names = tmp_path / "labels.txt"
    names.write_text("red\nblue\n\n green \n", encoding="utf-8")
    assert command(*asked, "--labels-file", names).out == done.out
    names.write_text("warm\tRed.\tOrange.\ncold\tBlue.\n", encoding="utf-8")
    assert command(*asked, "--labels-file", names).out.splitlines()[1].startswith(f"{discs[1]}: cold (cold 1.00, warm")
    many = command(*asked, "--labels", "red,blue,green,a,b,c,d", "--abstain-below", "1", "--temperature", "9")
    assert many.out.startswith(f"{discs[0]}: no label (red ")
    assert many.out.splitlines()[0].endswith(", 2 more)")
    with_prior = json.loads(
        command(*asked[:3], "--labels", "red,blue", "--prior", "--normalise", "tokens", "--json").out
    )
    assert with_prior["priors"].keys() == {"red", "blue"}


def test_calibrating_and_classifying_with_it(command: Command, labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    saved, image = tmp_path / "c.json", tmp_path / "0, disc.png"
    labels = ["--labels", "red,blue,green", "--prompt", ASKED]
    done = command("classify", "pebble:1.5", *labels, "--calibrate", labelled, "--save", saved)
    assert (done.code, done.err) == (0, "")
    made = Calibration.load(saved)
    assert done.out.startswith(f"4 pictures, 75.0% right; temperature {made.labelling.temperature:.3g}\n")
    plain = json.loads(command("classify", "pebble:1.5", image, *labels, "--json").out)
    again = json.loads(command("classify", "pebble:1.5", image, "--calibration", saved, "--json").out)
    assert again["probabilities"]["red"] < plain["probabilities"]["red"]
    assert command("classify", "pebble:1.5", image, *labels, "--calibration", saved).code == 0
    refused(
        command("classify", "pebble:1.5", image, "--calibration", saved, "--normalise", "bytes"), "normalise is 'bytes'"
    )
    refused(command("classify", "pebble", image, "--calibration", saved), "was made with pebble:1.5")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["x.png"], "no labels"),
        (["--labels", "cat,dog"], "no image"),
        (["x.png", "--labels", "cat"], "number of labels is 1;"),
        (["x.png", "--labels", "cat,,dog"], "label is ''"),
        (["x.png", "--labels", "cat,dog"], "x.png"),
        (["x.png", "--labels", "cat,dog", "--labels-file", "f"], "--labels-file"),
        (["x.png", "--labels-file", "none.txt"], "cannot be read"),
        (["x.png", "--labels-file", "mixed.txt"], "none for 'dog'"),
        (["x.png", "--labels-file", "twice.txt"], "begin with"),
        (["x.png", "--calibration", "none.json"], "cannot be read"),
        (["--labels", "cat,dog", "--calibrate", "x.csv"], "--save"),
        (["x.png", "--labels", "cat,dog", "--save", "x.json"], "--calibrate"),
        (["x.png", "--labels", "cat,dog", "--calibrate", "x.csv", "--save", "x.json"], "came with images"),
        (["--labels", "cat,dog", "--calibrate", "none.csv", "--save", "x.json"], "cannot be read"),
        (["x.png", "--labels", "cat,dog", "--temperature", "0"], "temperature is 0.0"),
        (["x.png", "--labels", "cat,dog", "--abstain-below", "2"], "abstain_below is 2.0"),
    ],
    ids=range(16),
)
def test_bad_arguments(
    command: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed.txt").write_text("cat\tA cat\ndog\n", encoding="utf-8")
    (tmp_path / "twice.txt").write_text("cat\tA cat\ncat\tA cat\ndog\tA dog\n", encoding="utf-8")
    refused(command("classify", "pebble:1.5", *arguments), word)


def test_a_calibration_that_cannot_be_written(command: Command, labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    where = tmp_path / "none" / "c.json"
    done = command("classify", "pebble:1.5", "--labels", "red,blue,green", "--prompt", ASKED, "--calibrate", labelled,
                   "--save", where)  # fmt: skip
    refused(done, "cannot be written")
