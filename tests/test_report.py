"""The report: no text of a prompt becomes markup, the same inputs give the same bytes, and in a real browser it filters, sorts and opens.

The browser tests need Debian's packages `chromium` and `chromium-driver`, and are skipped where these are missing.
"""

import base64
import contextlib
import json
import re
import shutil
import socketserver
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization import report
from circuit_generalization.ablation import Ablation
from circuit_generalization.attention import attention_pattern
from circuit_generalization.circuit import Circuit
from circuit_generalization.circuit_scorer import NO_BASELINE, CircuitScorer
from circuit_generalization.errors import InputError
from circuit_generalization.measurement import MeasureOptions, measure
from circuit_generalization.plots import save_figures
from circuit_generalization.prompts import PromptSet, concat_prompts
from circuit_generalization.report import chosen_prompts, csp_hash, figure_html, json_for_html, pack_column, prompt_details, report_data, write_report
from circuit_generalization.tasks import make_prompts

HOSTILE = '</script><script>document.title="hacked"</script><!-- <img src=x onerror="document.title=\'hacked\'"> $title ${data} &lt;i&gt; \u2028 \'"'
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAIAAAB7QOjdAAAADUlEQVR4nGP4z8AARAAH/gH/1bI7WQAAAABJRU5ErkJggg==")  # two by one
OPTIONS = MeasureOptions("compiled-ioi", axes=("lexical", "adversarial"), variants=("rare_names", "third_name"), n_prompts=30,
                         ablations=("resample", "counterfactual"), positions=("listed",), n_draws=2, n_random=2)


class Page(HTMLParser):
    """What Python's parser finds in a page: elements with their attributes, and the text of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.inside, self.here = [], {"script": [], "style": []}, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.here = tag
        if tag in self.inside: self.inside[tag].append("")

    def handle_endtag(self, tag): self.here = None

    def handle_data(self, text):
        if self.here in self.inside: self.inside[self.here][-1] += text

    def all(self, tag): return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self): return json.loads(self.inside["script"][0])


def made(n=6):
    """Scores and details written by hand."""
    rows = [dict(prompt_id=f"p{i}", base_id=f"p{i}", axis="base", variant="base", template=f"t{i % 2}", prompt=f"Ann and Bob {i}", answer=" Ann",
                 distractor=" Bob", model="m", circuit="c", ablation="resample", ld_model=1.0 + i, ld_circuit=i / 3, sufficiency=i / 7,
                 necessity=0.5, score=0.1 * i, verdict="active" if i % 3 else "overshoot", reason="because") for i in range(n)]
    details = [dict(prompt_id=f"p{i}", tokens=["Ann", " and", " Bob", f" {i}"], roles={"IO": 0, "S1": 2},
                    attention=[dict(head="a0.h1", role="mover", at="S1", reads=["IO"], weights=[0.75, 0.25, 0.0, 0.0])] if i == 0 else None)
               for i in range(n)]
    return pd.DataFrame(rows), details


def made_table():
    """One line a variant, as far as the page needs it."""
    numbers = dict(n=6, n_right=6, active_share=0.5, active_low=0.2, active_high=0.8,
                   difference=-0.1, difference_low=-0.2, difference_high=-0.01, p_adjusted=0.04)
    return pd.DataFrame([dict(axis=a, variant=v, conclusion="lower", **numbers) for a, v in [("base", "base"), ("lexical", "rare")]])


def written(path, *args, **kwargs):
    write_report(path, *args, **kwargs)
    return Path(path).read_text(encoding="utf-8")


# packing

LEAVES = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.sampled_from(["</script>", "<!--", HOSTILE])
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=8)


@given(JSON)
def test_json_cannot_end_its_element(value):
    text = json_for_html(value)
    assert "<" not in text and json.loads(text) == value and text.isascii()


def test_nan_does_not_become_json():
    with pytest.raises(ValueError):
        json_for_html([float("nan")])


@given(st.lists(st.text(max_size=4) | st.none()))
def test_text_is_levels_and_codes(values):
    packed = pack_column(pd.Series(values, dtype=object))
    assert [packed["levels"][c] for c in packed["codes"]] == [v or "" for v in values] and len(set(packed["levels"])) == len(packed["levels"])


@given(st.lists(st.floats(allow_infinity=False, min_value=-1e9, max_value=1e9) | st.none()))
def test_numbers_keep_four_digits(values):
    packed = pack_column(pd.Series(values, dtype=float))
    expected = [np.nan if v is None else v for v in values]
    assert all(p is None if np.isnan(v) else p == pytest.approx(v, rel=5.1e-4, abs=1e-300) for p, v in zip(packed, expected, strict=True))


def test_other_columns():
    assert pack_column(pd.Series([1234567, 0])) == [1234567, 0], "integers are not rounded"
    assert pack_column(pd.Series([np.inf, 0.123456])) == [None, 0.1235]
    assert pack_column(pd.Series([True, False])) == dict(levels=["True", "False"], codes=[0, 1])
    assert pack_column(pd.Series([True, np.nan, False])) == dict(levels=["True", "", "False"], codes=[0, 1, 2]), "as generalization.csv has it"


# which prompts, and what is said of them

def test_the_first_prompt_of_the_commonest_verdicts():
    scores = pd.DataFrame(dict(axis=["x"] * 8 + ["y"] * 2, variant=list("aaaaaabb") + list("aa"),
                               verdict="undecided active shortfall active shortfall rerouted overshoot overshoot active active".split()))
    assert chosen_prompts(scores, 3) == [0, 1, 2, 6, 8], "rerouted is as common as undecided, and comes later"
    assert chosen_prompts(scores, 1) == [1, 6, 8] and chosen_prompts(scores, 0) == []
    assert chosen_prompts(scores.set_index(pd.Index(range(100, 110))), 1) == [1, 6, 8], "row numbers, whatever the index"


def test_prompts_without_axis_are_chosen_too():
    scores = pd.DataFrame(dict(axis=np.nan, variant=np.nan, verdict=["active", "active", "shortfall"]))
    assert chosen_prompts(scores) == [0, 2]


@pytest.fixture(scope="module")
def scored(compiled):
    """A scorer, base prompts and third-name prompts, and their scores."""
    scorer = CircuitScorer(compiled, "compiled-ioi-ioi")
    prompts = concat_prompts([make_prompts("ioi", "base", "base", 5, tokenizer=compiled.tokenizer),
                              make_prompts("ioi", "adversarial", "third_name", 4, tokenizer=compiled.tokenizer)])
    return scorer, prompts, scorer.score(prompts, Ablation("counterfactual"), n_random=0, baseline=NO_BASELINE)


def test_tokens_and_roles_are_those_of_the_prompt(scored):
    scorer, prompts, scores = scored
    for i, d in enumerate(prompt_details(scorer, prompts, scores)):
        assert d["prompt_id"] == scores.prompt_id[i] and "".join(d["tokens"]) == scores.prompt[i] and len(d["tokens"]) == prompts.lengths[i]
        assert d["tokens"][d["roles"]["IO"]] == scores.answer[i] and d["tokens"][d["roles"]["S2"]] == scores.distractor[i]
        assert d["roles"]["END"] == len(d["tokens"]) - 1


def test_attention_is_what_engagement_is_the_mean_of(scored):
    scorer, prompts, scores = scored
    details = prompt_details(scorer, prompts, scores, per_variant=7)
    assert [i for i, d in enumerate(details) if d["attention"]] == chosen_prompts(scores, 7)
    i = chosen_prompts(scores)[0]
    for role in ("duplicate token", "S-inhibition"):
        rows = [a for a in details[i]["attention"] if a["role"] == role]
        seen = [a["weights"][details[i]["roles"][r]] for a in rows for r in a["reads"]]
        assert rows and np.mean(seen) == pytest.approx(scores[f"engagement_{role}"][i], abs=1e-3)
    (soft,) = [a["weights"] for a in details[i]["attention"] if a["head"] == "a3.h3"]  # the others look at one token only
    pattern = attention_pattern(scorer.model, prompts.tokens, ["a3.h3"])["a3.h3"][i, details[i]["roles"]["END"], :len(soft)]
    assert max(soft) < 0.99 and np.allclose(soft, pattern.detach(), rtol=0, atol=5.1e-4)
    heads = {n.name: n for n in scorer.circuit.nodes}
    for d in details:
        for a in d["attention"] or ():
            assert a["at"] in (heads[a["head"]].positions or ("END",)) and len(a["weights"]) == len(d["tokens"])
            assert sum(a["weights"]) == pytest.approx(1, abs=0.001 * len(d["tokens"])) and not any(a["weights"][d["roles"][a["at"]] + 1:])
            assert all(w == round(w, 3) for w in a["weights"])


def test_prompts_may_come_in_any_order_and_batch(scored):
    scorer, prompts, scores = scored
    small = CircuitScorer(scorer.model, scorer.circuit, batch_size=1)
    assert prompt_details(small, prompts[[8, 0, 1, 2, 7, 6, 5, 3, 4]], scores) == prompt_details(scorer, prompts, scores)
    assert prompt_details(scorer, prompts, scores.iloc[5:]) == prompt_details(scorer, prompts, scores)[5:]


def test_a_circuit_without_positions_looks_from_the_end_and_mlps_do_not_look(scored):
    scorer, prompts, scores = scored
    claim = Circuit.from_components(["a2.h0", "m1"])
    (row,) = prompt_details(CircuitScorer(scorer.model, claim), prompts, scores)[0]["attention"]
    assert (row["head"], row["role"], row["at"], row["reads"]) == ("a2.h0", None, "END", [])
    only_mlp = CircuitScorer(scorer.model, Circuit.from_components(["m1"]))
    assert not any(d["attention"] for d in prompt_details(only_mlp, prompts, scores))


def test_without_a_tokenizer_tokens_are_numbers(random_model):
    prompts = PromptSet.from_tokens([[5, 6, 7], [8, 9]], answers=[1, 1], distractors=[2, 2])
    scores = pd.DataFrame(dict(prompt_id=["p0001", "p0000"], axis="", variant="", verdict="active"))
    details = prompt_details(CircuitScorer(random_model, Circuit.from_components(["a1.h2"])), prompts, scores)
    assert [d["tokens"] for d in details] == [["8", "9"], ["5", "6", "7"]] and len(details[0]["attention"][0]["weights"]) == 2


def test_scores_of_other_prompts_are_refused(scored):
    scorer, prompts, scores = scored
    with pytest.raises(InputError, match=re.escape(scores.prompt_id[8])):
        prompt_details(scorer, prompts[:8], scores)


# the data of the page

def test_unknown_columns_go_along():
    scores, details = made()
    data = report_data(scores.assign(reads_new=np.linspace(0, 1, 6), odd=list("abcabc")), made_table().assign(extra=[1, 2]), details)
    assert data["scores"]["reads_new"][-1] == 1 and data["scores"]["odd"]["levels"] == ["a", "b", "c"] and data["table"]["extra"] == [1, 2]


def test_columns_of_one_value_are_said_once():
    scores, details = made()
    scores["half"] = ["only here"] + [None] * 5
    data = report_data(scores.assign(seed=0, p_value=0.025, gap=np.nan, sign_agrees=True), None, details)
    assert data["constants"] == dict(answer=" Ann", distractor=" Bob", model="m", circuit="c", ablation="resample", seed=0)
    assert data["scores"]["p_value"] == [0.025] * 6 and data["scores"]["gap"] == [None] * 6, "what was measured is said of each prompt"
    assert data["scores"]["half"] == dict(levels=["only here", ""], codes=[0, 1, 1, 1, 1, 1])
    assert not set(data["constants"]) & set(data["scores"]) and {"axis", "variant", "reason", "necessity"} <= set(data["scores"])


def test_tokens_roles_and_attention_can_be_read_back():
    scores, details = made()
    details[4]["roles"] = {"S1": 1}
    data = report_data(scores, None, details)
    words = data["tokens"]["vocabulary"]
    assert [[words[k] for k in ids] for ids in data["tokens"]["ids"]] == [d["tokens"] for d in details] and len(words) == 9
    assert data["roles"] == {"IO": [0, 0, 0, 0, -1, 0], "S1": [2, 2, 2, 2, 1, 2]} and data["attention"] == {0: details[0]["attention"]}


def test_the_sweep_is_one_run_a_setting_in_the_order_of_the_scores():
    scores, _ = made(3)
    mean = scores.iloc[::-1].assign(ablation="mean", sufficiency=[3.0, 2.0, 1.0], verdict=["rerouted", "active", "active"])
    data = report_data(scores, sweep=mean)
    assert [(r["name"], r["columns"]["sufficiency"]) for r in data["sweep"]] == [("mean", [1, 2, 3])]
    assert data["sweep"][0]["columns"]["verdict"] == dict(levels=["active", "rerouted"], codes=[0, 0, 1])
    more = pd.concat([mean.assign(level=level, positions=p) for level in ("node", "edge") for p in ("listed", "all")])
    assert [r["name"] for r in report_data(scores, sweep=more)["sweep"]] == [
        "mean", "mean, all positions", "mean of edges", "mean of edges, all positions"]
    with pytest.raises(InputError, match="p2 twice"):
        report_data(scores, sweep=more.drop(columns="positions"))
    assert report_data(scores, sweep=mean.iloc[:0])["sweep"] == []


@pytest.mark.parametrize("column", report.NEEDED)
def test_a_missing_column_is_named(tmp_path, column):
    scores, details = made()
    with pytest.raises(InputError, match=f"scores have no column {column}$"):
        write_report(tmp_path / "r.html", scores.drop(columns=column), None, details)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("column", report.NEEDED_OF_TABLE)
def test_a_missing_column_of_the_variants_is_named(column):
    with pytest.raises(InputError, match=f"variants have no column {column}$"):
        report_data(made()[0], made_table().drop(columns=column))


def test_tables_that_do_not_fit_together_are_refused():
    scores, details = made()
    for bad in (details[::-1], details[:-1], [details[0] | dict(prompt_id="other"), *details[1:]]):
        with pytest.raises(InputError, match="details are not of the prompts in scores"):
            report_data(scores, details=bad)
    with pytest.raises(InputError, match="prompt p1 twice"):
        report_data(pd.concat([scores, scores.iloc[1:2]]))
    with pytest.raises(InputError, match="scores are empty"):
        report_data(scores.iloc[:0])


# the file

def test_the_same_inputs_give_the_same_bytes_and_nothing_else(tmp_path):
    scores, details = made()
    arguments = scores, made_table(), details, {"verdicts": PIXEL}, dict(options=dict(model="m"), seconds=1.5), scores.assign(ablation="mean")
    assert written(tmp_path / "a.html", *arguments) == written(tmp_path / "b.html", *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_scores_alone_are_enough(tmp_path):
    data = Page(written(tmp_path / "deep" / "r.html", made()[0])).data
    assert data["table"] is None and data["tokens"] is None and data["attention"] == {} and data["sweep"] == []


def test_the_figures_are_inside(tmp_path):
    (tmp_path / "one.png").write_bytes(PIXEL)
    page = Page(written(tmp_path / "r.html", made()[0], figures={"verdicts": tmp_path / "one.png", "My <own> figure": PIXEL + b"more"}))
    first, second = page.all("img")
    assert [base64.b64decode(i["src"].removeprefix("data:image/png;base64,")) for i in (first, second)] == [PIXEL, PIXEL + b"more"]
    assert (first["width"], first["height"]) == ("2", "1") and "Stacked bars" in first["alt"] and "My <own> figure" in second["alt"]


def test_every_figure_that_is_drawn_has_words(tmp_path):
    scores, table, settings = _enough_to_draw()
    names = {p.stem for p in save_figures(scores, table, tmp_path, settings)}
    assert names == set(report.FIGURES)


def _enough_to_draw():
    scores = made()[0].assign(ld_ablated=0.0, **{"reads_a0.h1": 0.5})
    return scores, made_table(), pd.concat([made_table().assign(setting=s) for s in ("resample", "mean")], ignore_index=True)


@pytest.mark.parametrize("png, says", [(b"GIF89a" + bytes(30), "not a PNG"), (b"\x89PNG\r\n\x1a\n", "not a PNG"), ("no/such.png", "cannot be read")])
def test_a_figure_that_is_none_is_refused(tmp_path, png, says):
    with pytest.raises(InputError, match=f"figure verdicts .*{says}|figure verdicts {says}"):
        write_report(tmp_path / "r.html", made()[0], figures={"verdicts": png})
    assert not (tmp_path / "r.html").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file"):
        write_report(tmp_path / "file" / "r.html", made()[0])


def hostile_report(path):
    """Every text of every table is hostile."""
    scores, details = made()
    texts = dict.fromkeys("axis variant template prompt answer distractor reason model circuit ablation base_id".split(), HOSTILE)
    scores = scores.assign(**texts, **{HOSTILE: 0.5, "reads_" + HOSTILE: np.arange(6.0)}, prompt_id=[f"{i}{HOSTILE}" for i in range(6)])
    scores.loc[5, "verdict"] = HOSTILE
    details = [dict(prompt_id=p, tokens=[HOSTILE] * 4, roles={HOSTILE: 1, "IO+1": 2}, attention=d["attention"] and [
        dict(head=HOSTILE, role=HOSTILE, at=HOSTILE, reads=[HOSTILE], weights=[0.75, 0.25, 0.0, 0.0])]) for p, d in zip(scores.prompt_id, details)]
    table = made_table().assign(axis=["base", HOSTILE], variant=["base", HOSTILE], conclusion=HOSTILE, **{HOSTILE: HOSTILE})
    manifest = dict(options=dict(model=HOSTILE, task=HOSTILE), hashes=dict(model=HOSTILE), versions={HOSTILE: HOSTILE}, commit=HOSTILE)
    sweep = scores.assign(ablation=HOSTILE)
    return written(path, scores, table, details, {HOSTILE: PIXEL}, manifest, sweep)


def test_no_text_becomes_markup(tmp_path):
    tame, hostile = Page(written(tmp_path / "t.html", *made()[:1], figures={"x": PIXEL})), Page(hostile_report(tmp_path / "h.html"))
    assert Counter(t for t, _ in tame.elements) == Counter(t for t, _ in hostile.elements)
    assert [sorted(a) for _, a in tame.elements] == [sorted(a) for _, a in hostile.elements]
    assert hostile.data["tokens"]["vocabulary"] == [HOSTILE] and HOSTILE in hostile.all("img")[0]["alt"]


def test_the_page_asks_for_nothing(tmp_path):
    page = Page(hostile_report(tmp_path / "r.html"))
    assert {"http:", "https:"}.isdisjoint(re.findall(r"\w+:(?=//)", "".join(page.inside["style"] + page.inside["script"][1:])))
    assert not re.search(r"url\(|@import|import\(|fetch|XMLHttp|WebSocket|innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(",
                         "".join(page.inside["style"] + page.inside["script"][1:]))
    for tag, attributes in page.elements:
        assert not [a for a in attributes if a.startswith("on") or a in ("style", "srcset", "action")], tag
        assert all(attributes.get(a, "#").startswith(("#", "data:")) for a in ("src", "href")), tag


def test_the_policy_allows_its_own_script_and_style_only(tmp_path):
    page = Page(written(tmp_path / "r.html", made()[0]))
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    (_, script), (style,) = page.inside["script"], page.inside["style"]
    assert page.all("script") == [dict(type="application/json", id="data"), {}]
    assert dict(part.strip().split(" ", 1) for part in policy.split(";")) == {
        "default-src": "'none'", "img-src": "data:", "style-src": f"'{csp_hash(style)}'", "script-src": f"'{csp_hash(script)}'",
        "base-uri": "'none'", "form-action": "'none'"}


def test_a_hash_by_hand():
    assert csp_hash("alert('Hello, world.');") == "sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng=", "the example of the CSP specification"


def test_an_unknown_figure_is_escaped():
    assert Page(figure_html(HOSTILE, PIXEL)).elements[0][0] == "figure" and len(Page(figure_html(HOSTILE, PIXEL)).elements) == 3


# from a folder

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished measurement with its report."""
    folder = tmp_path_factory.mktemp("measured")
    result = measure(OPTIONS, folder)
    save_figures(result.scores, result.table, folder / "figures", result.ablations)
    assert report.report_folder(folder) == folder / "report.html"
    return folder


def scores_of(folder): return pd.read_csv(folder / "scores.csv", keep_default_na=False, na_values=[""])


def data_of(folder): return Page((folder / "report.html").read_text(encoding="utf-8")).data


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.slow
def test_a_folder_makes_a_report(folder, copy):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    scores = pd.read_csv(folder / "scores.csv")
    assert len(page.data["tokens"]["ids"]) == len(scores) == 90 and {int(i) for i in page.data["attention"]} == set(chosen_prompts(scores))
    figures = {base64.b64decode(i["src"].partition(",")[2]) for i in page.all("img")}
    assert figures == {p.read_bytes() for p in (folder / "figures").glob("*.png")}
    assert page.data["manifest"] == json.loads((folder / "manifest.json").read_text())
    assert [run["name"] for run in page.data["sweep"]] == ["counterfactual", "resample of edges", "counterfactual of edges"]
    report.report_folder(copy)
    assert (copy / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def change_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("damage, says", [
    (lambda f: change_manifest(f, lambda m: m["hashes"].update(model="0" * 64)), "another model \\(000000000000, now"),
    (lambda f: change_manifest(f, lambda m: m["hashes"].update(circuit="0" * 12)), "another circuit"),
    (lambda f: change_manifest(f, lambda m: m["hashes"]["prompts"].update(third_name="0" * 12)), "another set of third_name prompts"),
    (lambda f: change_manifest(f, lambda m: m["options"].update(seed=1)), "another set of base prompts"),
    (lambda f: change_manifest(f, lambda m: m.pop("hashes")), "manifest.json: not the manifest of a measurement"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: not the manifest of a measurement"),
    (lambda f: (f / "manifest.json").unlink(), "run circuit-gen measure first"),
    (lambda f: (f / "sweep.csv").unlink(), "sweep.csv: not a table that can be read"),
    (lambda f: (f / "figures" / "verdicts.png").write_bytes(b"?"), "figure verdicts is not a PNG"),
])
def test_a_folder_that_is_not_whole_is_refused(copy, damage, says):
    (copy / "report.html").unlink()
    damage(copy)
    with pytest.raises(InputError, match=says):
        report.report_folder(copy)
    assert not (copy / "report.html").exists()


@pytest.mark.slow
def test_thousands_of_prompts_fit(folder, tmp_path):
    data, scores = data_of(folder), scores_of(folder)
    words, rng = data["tokens"]["vocabulary"], np.random.default_rng(0)
    details = [dict(prompt_id=p, tokens=[words[k] for k in ids], roles={r: v[i] for r, v in data["roles"].items()},
                    attention=data["attention"].get(str(i))) for i, (p, ids) in enumerate(zip(scores.prompt_id, data["tokens"]["ids"]))]
    copies = range(38)
    many = pd.concat([scores.assign(prompt_id=scores.prompt_id + f"-{k}", variant=scores.variant + f"-{k}") for k in copies], ignore_index=True)
    noise = rng.normal(size=(len(many), 20))
    many = many.assign(**{c: many[c] + noise[:, 0] for c in many.select_dtypes("float")}, **{f"reads_{k}": noise[:, k] for k in range(20)})
    size = len(written(tmp_path / "r.html", many, None, [d | dict(prompt_id=f"{d['prompt_id']}-{k}") for k in copies for d in details]))
    assert len(many) > 3400 and size < 5e6, "with a megabyte of figures it stays below six"


# in a browser

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync --window-size=1280,900")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """One headless Chromium for all tests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver): pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]: options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Report:
    """A report in the browser, as a reader meets it."""

    def __init__(self, browser, path):
        self.browser, self.url = browser, path.as_uri()
        self.open()

    def open(self, address=""):
        self.browser.get("about:blank")
        self.browser.get(self.url + address)

    def run(self, script, *arguments): return self.browser.execute_script(script, *arguments)

    def find(self, css): return self.browser.find_element("css selector", css)

    def all(self, css): return self.browser.find_elements("css selector", css)

    def text(self, css): return self.run("return document.querySelector(arguments[0]).textContent", css)

    def choose(self, name, value):
        self.run("const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))", name, value)

    def press(self, css, key):
        self.find(css).send_keys(key)

    @property
    def shown(self): return self.run("return [...document.querySelectorAll('#scores .prompt')].map(r => r.dataset.prompt)")

    @property
    def count(self): return self.text("#count")

    @property
    def address(self): return self.run("return decodeURIComponent(location.hash.replaceAll('+', ' '))")

    def column(self, n): return self.run("return [...document.querySelectorAll('#scores .prompt')].map(r => r.cells[arguments[0]].textContent)", n)


@pytest.fixture
def page(chromium, folder):
    for log in ("browser", "performance"): chromium.get_log(log)
    page = Report(chromium, folder / "report.html")
    yield page
    assert chromium.get_log("browser") == [], "the console has something to say"
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    asked = {u.partition("#")[0] for u in asked if not u.startswith(("data:", "chrome:"))}  # chrome: Chromium's own first page
    assert asked - {page.url, "about:blank"} == set(), "a request left the page"


@pytest.fixture(scope="module")
def scores(folder): return scores_of(folder)


@pytest.mark.slow
def test_filters(page, scores):
    assert page.count == "90 prompts" and page.shown == scores.prompt_id[:50].tolist()
    page.choose("axis", "adversarial")
    wanted = scores[scores.axis == "adversarial"]
    assert page.count == "30 of 90 prompts" and page.shown == wanted.prompt_id.tolist() and page.address == "#axis=adversarial"
    page.choose("axis", "")
    page.choose("variant", "rare_names")
    assert page.shown == scores.prompt_id[scores.variant == "rare_names"].tolist()
    page.choose("axis", "adversarial")
    assert page.run("return document.getElementById('variant').value") == "" and page.count == "30 of 90 prompts", "no variant of another axis"
    page.choose("axis", "")
    verdict = scores.verdict.iloc[-1]
    page.choose("verdict", verdict)
    assert page.shown == scores.prompt_id[scores.verdict == verdict].tolist()[:50]
    page.choose("q", "NO such words")
    assert page.shown == [] and page.count == "0 of 90 prompts" and "No prompt fits" in page.text("#scores tbody")
    page.find("#reset").click()
    assert page.count == "90 prompts" and page.address == "" and page.run("return document.getElementById('q').value") == ""


@pytest.mark.slow
def test_search(page, scores):
    words = [scores.prompt[7].split()[-2], scores.answer[7].strip().lower()]
    page.press("#q", f"{words[0].upper()}  {words[1]}")
    text = (scores.prompt + "\n" + scores.prompt_id + "\n" + scores.template + "\n" + scores.answer + "\n" + scores.distractor).str.lower()
    wanted = scores.prompt_id[[all(w in t for w in words) for t in text]]
    assert 0 < len(wanted) < 90 and page.shown == wanted.tolist(), "every word, in any order and case"
    page.choose("q", scores.prompt_id[40])
    assert page.shown == [scores.prompt_id[40]]


@pytest.mark.slow
def test_only_prompts_with_attention(page, scores):
    page.find("#attention").click()
    assert page.shown == scores.prompt_id[chosen_prompts(scores)].tolist() and page.address == "#attention=1"
    assert len(page.all("#scores .prompt .eye")) == len(page.shown)


@pytest.mark.slow
def test_the_address_holds_the_state(page, scores):
    verdict = scores.verdict[scores.variant == "third_name"].iloc[0]
    page.open(f"#variant=third_name&verdict={verdict}&sort=-ld_model&extra=kl")
    wanted = scores[(scores.variant == "third_name") & (scores.verdict == verdict)].sort_values("ld_model", ascending=False, kind="stable")
    assert page.shown == wanted.prompt_id.tolist() and page.run("return document.getElementById('extra').value") == "kl"
    page.run("location.hash = 'axis=lexical'")
    page.run("return new Promise(done => setTimeout(done, 100))")
    assert page.count == "30 of 90 prompts"
    page.open("#axis=nowhere&variant=%3Cb%3E&verdict=x&sort=nothing&extra=nothing&prompt=nobody&constructor=1")
    assert page.count == "90 prompts" and page.address == "", "what does not exist is left out"
    page.open("#figures")
    assert page.count == "90 prompts"


@pytest.mark.slow
def test_a_link_to_a_section_keeps_the_filters(page):
    page.choose("axis", "lexical")
    page.find("nav a[href='#figures']").click()
    assert page.address == "#axis=lexical" and page.run("return document.activeElement.id") == "figures"


@pytest.mark.slow
def test_sorting_by_click_and_by_key(page, scores):
    def orders(): return [o for o in page.run("return [...document.querySelectorAll('#scores th[aria-sort]')].map(t => t.ariaSort)") if o != "none"]
    page.find("#sort-score").click()
    rising = scores.sort_values("score", kind="stable", na_position="last")
    assert page.shown == rising.prompt_id[:50].tolist() and orders() == ["ascending"] and page.address == "#sort=score"
    page.press("#sort-score", "\ue007")
    assert page.shown[0] == scores.prompt_id[scores.score.idxmax()] and orders() == ["descending"]
    assert page.run("return document.activeElement.id") == "sort-score", "the key does not lose its place"
    page.press("#sort-score", "\ue00d")
    assert page.shown == scores.prompt_id[:50].tolist() and orders() == []
    page.find("#sort-verdict").click()
    page.press("#sort-verdict", "\ue007")
    assert page.shown == scores.sort_values("verdict", ascending=False, kind="stable").prompt_id[:50].tolist()


@pytest.mark.slow
def test_missing_numbers_come_last(page, scores, tmp_path):
    some = made()[0].assign(necessity=[0.3, np.nan, 0.1, np.nan, 0.2, 0.5])
    written(tmp_path / "r.html", some)
    other = Report(page.browser, tmp_path / "r.html")
    orders = []
    for _ in range(2):
        other.find("#sort-necessity").click()
        orders.append(other.shown)
    assert orders == [["p2", "p4", "p0", "p5", "p1", "p3"], ["p5", "p0", "p4", "p2", "p1", "p3"]] and other.column(5)[-1] == "–"
    page.browser.get_log("performance")


@pytest.mark.slow
def test_pages(page, scores):
    assert page.text("#page") == "page 1 of 2" and not page.find("#previous").is_enabled()
    page.find("#next").click()
    assert page.shown == scores.prompt_id[50:].tolist() and page.text("#page-end") == "page 2 of 2" and not page.find("#next-end").is_enabled()
    page.choose("axis", "base")
    assert page.text("#page") == "page 1 of 1"


@pytest.mark.slow
def test_another_column_can_be_shown(page, scores):
    page.choose("extra", "kl")
    assert [float(x) for x in page.column(9)] == pytest.approx(scores.kl[:50].tolist(), abs=0.006) and page.address == "#extra=kl"
    page.find("#sort-kl").click()
    assert page.shown == scores.sort_values("kl", kind="stable").prompt_id[:50].tolist()


@pytest.mark.slow
def test_roles_have_a_label_and_not_only_a_colour(page, scores):
    row = page.run("""return [...document.querySelector('#scores .prompt .text').querySelectorAll('.role')]
                             .map(r => [r.firstChild.data, r.querySelector('sub').textContent, getComputedStyle(r).backgroundColor])""")
    names = {role: (text, colour) for text, role, colour in row}
    assert (" " + names["IO"][0], " " + names["S1"][0], " " + names["S2"][0]) == (scores.answer[0], scores.distractor[0], scores.distractor[0])
    assert len({colour for _, colour in names.values()}) == len(names) == 4
    text = page.run("""const text = document.querySelector('#scores .prompt .text').cloneNode(true);
                       text.querySelectorAll('sub').forEach(label => label.remove()); return text.textContent""")
    assert text == scores.prompt[0]


@pytest.mark.slow
def test_details_open_and_show_attention(page, scores, folder):
    i = chosen_prompts(scores)[0]
    row = f"#row-{i}"
    page.press(f"{row} .open", "\ue007")
    assert page.find(f"{row} .open").get_attribute("aria-expanded") == "true" and page.address == f"#prompt={scores.prompt_id[i]}"
    data = data_of(folder)
    tokens = [data["tokens"]["vocabulary"][k].strip() for k in data["tokens"]["ids"][i]]
    assert page.run("return [...document.querySelectorAll('.attention thead .word')].map(w => w.textContent)") == tokens
    rows = page.run("return [...document.querySelectorAll('.attention tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert [r[0] for r in rows] == [f"{a['head']} {a['role']} at {a['at']}" for a in data["attention"][str(i)]]
    assert [[0 if x == "·" else float(x) for x in r[1:]] for r in rows] == [a["weights"] for a in data["attention"][str(i)]]
    framed = page.run("""return [...document.querySelectorAll('.attention tbody tr')]
                                .map(r => [...r.cells].findIndex(c => c.classList.contains('wanted')) - 1)""")
    assert framed == [data["roles"][a["reads"][0]][i] if a["reads"] else -2 for a in data["attention"][str(i)]]
    detail = page.text(f"#detail-{i}")
    for wanted in ("Under other ablations", "counterfactual", "LD(∅), all ablated", "p against random circuits"): assert wanted in detail
    page.press(f"{row} .open", "\ue00d")
    assert not page.all(".detail") and page.address == ""


@pytest.mark.slow
def test_a_click_on_a_row_opens_it_and_leads_to_its_base(page, scores):
    page.open("#variant=third_name")
    first = int(np.flatnonzero(scores.variant == "third_name")[1])
    page.find(f"#row-{first} .says").click()
    assert scores.prompt[0].split(",")[0] and "Its base prompt" in page.text(f"#detail-{first}")
    page.find(f"#detail-{first} .link").click()
    base = int(np.flatnonzero(scores.prompt_id == scores.base_id[first])[0])
    assert page.count == "90 prompts" and page.all(f"#detail-{base}") and page.address == f"#prompt={scores.prompt_id[base]}"
    assert page.run("return document.activeElement.closest('tr').id") == f"row-{base}"


@pytest.mark.slow
def test_a_prompt_in_the_address_is_opened_on_its_page(page, scores):
    page.open(f"#prompt={scores.prompt_id[77]}")
    assert page.text("#page") == "page 2 of 2" and page.all("#detail-77")
    top, bottom, head, height = page.run("""const row = document.getElementById('row-77').getBoundingClientRect();
      return [row.top, row.bottom, document.querySelector('#scores thead th').getBoundingClientRect().bottom, innerHeight]""")
    assert 0 < head <= top < bottom <= height, "and is in view, below the headings that stay"


@pytest.mark.slow
def test_variants_say_what_the_table_says_and_lead_to_their_prompts(page, folder):
    table = pd.read_csv(folder / "generalization.csv")
    text = page.text("#variant-table")
    assert all(str(c) in text for c in table.conclusion.dropna()) and "(reference)" in text
    rows = page.run("return [...document.querySelectorAll('#variant-table tbody tr:not(.group)')].map(r => [...r.cells].map(c => c.textContent))")
    assert [row[9] for row in rows[1:]] == table.generalises[1:].tolist() and [row[7] for row in rows[1:]] == [
        "–" if np.isnan(x) else f"{100 * x:.0f}" for x in table.smallest_difference[1:]]
    for i, row in table.iterrows(): assert rows[i][1] == f"{row.n_right}/{row.n}" and rows[i][3].startswith(f"{100 * row.active_share:.0f} [")
    shares = page.run("""return [...document.querySelectorAll('#verdict-table tbody tr:not(.group)')]
                                .map(r => [...r.cells].slice(1, 8).map(c => c.textContent))""")
    order = [c for c in report.VERDICT_STYLE]
    assert shares == [["·" if row[f"share_{v}"] == 0 else f"{100 * row[f'share_{v}']:.0f}" for v in order] for _, row in table.iterrows()]
    page.all("#variant-table .link")[-1].click()
    assert page.address == "#axis=adversarial&variant=third_name" and page.count == "30 of 90 prompts"


@pytest.mark.slow
def test_numbers_of_variants_are_written_for_readers(chromium, tmp_path):
    table = made_table().assign(ratio_of_means=[1.004, -0.001], mean_of_ratios=[2.5, np.nan],
                                gap=-0.126, gap_low=-0.2, gap_high=0.1, gap_restored=0.02,
                                another_reason=[0.25, 0.5], another_reason_low=[0.1, np.nan], another_reason_high=[0.4, np.nan],
                                share_active=[1.0, 0.0], odd=[0.00012345, 1234.5], note="new")
    written(tmp_path / "r.html", made()[0], table)
    page = Report(chromium, tmp_path / "r.html")
    cells = "return [...document.querySelectorAll(arguments[0] + ' tbody tr:not(.group)')].map(r => [...r.cells].map(c => c.textContent))"
    assert page.run(cells, "#variant-table") == [["base", "6/6", "50 [20, 80]", "", "", "(reference)"],
                                                 ["rare", "6/6", "50 [20, 80]", "−10 [−20, −1]", "0.040", "lower"]]
    assert page.run(cells, "#verdict-table") == [["base", "100", "25 [10, 40]"], ["rare", "·", "50"]]
    assert page.run(cells, "#size-table") == [["base", "1.00", "2.50", "−0.13 [−0.20, 0.10]", "0.02", "1.2e−4", "new"],
                                              ["rare", "0.00", "–", "−0.13 [−0.20, 0.10]", "0.02", "1234", "new"]]
    assert "lower (1 variant): rare −10." in page.text("#summary") and "active on 50% [20, 80]" in page.text("#summary")


@pytest.mark.slow
def test_what_was_measured_is_said(page, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    text = page.text("#manifest")
    hashes, torch = manifest["hashes"], manifest["versions"]["torch"]
    for wanted in ("compiled-ioi", hashes["model"], hashes["circuit"], f"torch {torch}", "a0.h1 (duplicate token)"): assert wanted in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 820, 360])
def test_no_width_scrolls_sideways(page, width, scores):
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500))
    try:
        page.open(f"#prompt={scores.prompt_id[0]}")
        assert page.run("return document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_hostile_text_is_shown_and_does_not_run(chromium, tmp_path):
    hostile_report(tmp_path / "r.html")
    page = Report(chromium, tmp_path / "r.html")
    page.find("#scores .open").click()
    page.choose("extra", "reads_" + HOSTILE)
    for details in page.all("details"): page.run("arguments[0].open = true", details)
    assert chromium.title.startswith("Is circuit </script>") and page.run("return document.scripts.length") == 2
    assert page.run("return document.querySelectorAll('img').length") == 1 and page.count == "6 prompts"
    for css in ("h1", ".subtitle", "#size-table", "#scores .prompt .variant", "#scores .prompt .text", "#scores .prompt .reason", ".detail .identity",
                ".detail .numbers", ".attention", "#variant", "#variant-table", "#manifest", "#summary", "#roles", "figcaption", "#extra"):
        assert HOSTILE.replace("_", " ") in page.text(css).replace("_", " "), css
    page.choose("q", '<script>document.title="hacked"')
    assert page.count == "6 prompts"
    assert chromium.get_log("browser") == []


@contextlib.contextmanager
def server():
    """An address on this machine, and a list of who connects to it."""
    connected = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self): connected.append(self.client_address)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as there:
        threading.Thread(target=there.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{there.server_address[1]}", connected
        there.shutdown()


@pytest.mark.slow
def test_the_policy_would_stop_a_request_and_a_script(chromium, folder):
    Report(chromium, folder / "report.html")
    tries = """const [url, done] = arguments, said = [];
      addEventListener('securitypolicyviolation', event => said.push(event.effectiveDirective));
      const add = (tag, attributes) => document.body.append(Object.assign(document.createElement(tag), attributes));
      add('img', {src: url + '/img'}); add('script', {src: url + '/script'}); add('script', {textContent: 'document.title = "hacked"'});
      add('link', {rel: 'stylesheet', href: url + '/style'});
      fetch(url + '/fetch').catch(() => setTimeout(() => done(said), 300));"""
    with server() as (url, connected):
        said = chromium.execute_async_script(tries, url)
        assert connected == []
    assert {"img-src", "script-src-elem", "style-src-elem", "connect-src"} == set(said) and chromium.title != "hacked"
    for log in ("browser", "performance"): chromium.get_log(log)
