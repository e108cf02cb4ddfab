"""A model by name, end to end: the hub's own client against a hub on loopback (`local_hub`), in processes with a cache of their own.

The client reads its settings when it is imported, so whatever concerns a hub runs in a process that is started with them.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_hub import commit, running
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from circuit_generalization.hub import ModelError, has_weights, wanted_files, within
from circuit_generalization.models import embedded_models, find_model, load_model, model_hash, quiet, random_gpt2

PROGRAM = Path(sys.executable).with_name("circuit-gen")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 5274  # of the embedded models' tokenizer

FIND = """
import json, sys
from circuit_generalization.hub import ModelError, hub_folder
for name in sys.argv[1:]:
    try: print(json.dumps({"folder": str(hub_folder(name))}))
    except ModelError as error: print(json.dumps({"refused": str(error)}))
"""
LOAD = """
import json, sys
from circuit_generalization.models import load_model, model_hash, model_name
for name in sys.argv[1:]:
    model = load_model(name)
    print(json.dumps({"hash": model_hash(model), "name": model_name(model), "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
                      "training": model.training, "ids": model.tokenizer.encode(" When Mary") if model.tokenizer else None}))
"""
COMMANDS = """
import json, sys
from circuit_generalization.cli import main
for command in json.loads(sys.argv[1]): print(main(command), flush=True)
"""


# models as they are published

def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved(model, folder, tokenizer=True, **options):
    with quiet(): model.save_pretrained(folder, **options)
    for name in TOKENIZER if tokenizer else (): shutil.copy(embedded_models()["organism-a"] / name, folder)
    return folder


def relabelled(folder, rename, more):
    """The same weights under the names that a published file has, with the buffers that old ones carry along."""
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {name: tensor.clone() for name, tensor in more.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gpt2(seed, **sizes):
    return random_gpt2(seed, n_vocab=VOCABULARY, **sizes)


def pythia():
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval().half()


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """name → (model, folder): what the hub of these tests has."""
    root, mask = tmp_path_factory.mktemp("published"), torch.ones(32, 32).tril()
    small, medium, neox = gpt2(1), gpt2(2, n_layers=1, d_model=512), pythia()  # the second has more than the client reads at a time
    folders = [saved(small, root / "gpt2"), saved(medium, root / "gpt2-medium"), saved(neox, root / "pythia")]
    relabelled(folders[0], lambda name: name.removeprefix("transformer."), {f"h.{i}.attn.bias": mask[None, None] for i in (0, 1)})
    old = {f"gpt_neox.layers.{i}.attention.{name}": tensor for i in (0, 1) for name, tensor in
           {"bias": mask[None, None].bool(), "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.ones(4)}.items()}
    relabelled(folders[2], lambda name: name, old)
    return dict(zip(["gpt2", "gpt2-medium", "EleutherAI/pythia-160m"], zip([small, medium, neox], folders)))


@pytest.fixture
def hub(published):
    with running() as hub:
        for name, (_, folder) in published.items():
            hub.publish(f"openai-community/{name}" if "/" not in name else name, files_of(folder))
        yield hub


@pytest.fixture
def settings(hub, tmp_path):
    """The environment of a process: this hub, an empty cache, nothing else of a hub's."""
    others = re.compile("HF_|HUGGINGFACE|TRANSFORMERS_|.*_PROXY", re.IGNORECASE)
    return {key: value for key, value in os.environ.items() if not others.match(key)} | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}


def python(code, *arguments, settings, **options):
    return subprocess.run([sys.executable, "-c", code, *arguments], env=settings, capture_output=True, text=True, **options)


@pytest.fixture
def find(settings):
    """Where `hub_folder` finds models: for each name its folder, or what is said; nothing else may be said."""
    def run(*names, **more):
        done = python(FIND, *names, settings=settings | more)
        assert done.returncode == 0, done.stderr
        said = [json.loads(line) for line in done.stdout.splitlines()]
        assert all("\n" not in answer.get("refused", "") for answer in said)
        return said if len(said) > 1 else said[0]

    return run


def found(answer):
    return Path(answer["folder"])


def link_of(folder, name="model.safetensors"):
    """The file in the client's cache that holds what a folder shows."""
    return (folder / name).resolve()


# a name becomes a model

@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-160m"])
def test_a_downloaded_model_is_the_published_one(name, find, published, hub, tmp_path):
    original, folder = published[name]
    model = load_model(found(find(name)))
    assert model_hash(model) == model_hash(original) == model_hash(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    tokens = torch.arange(10)[None]
    with torch.no_grad(): torch.testing.assert_close(model(tokens), original.float()(tokens).logits, atol=1e-5, rtol=0)
    assert model.tokenizer.encode(" When Mary") == load_model("organism-a").tokenizer.encode(" When Mary")
    assert (tmp_path / "home" / "hub" / f"models--{name.replace('/', '--')}").is_dir()


@pytest.mark.slow
def test_names_load_as_they_are_given(published, settings):
    done = python(LOAD, *published, settings=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 3
    for line, (name, (original, _)) in zip(done.stdout.splitlines(), published.items()):
        assert json.loads(line) == {"hash": model_hash(original), "name": name.rpartition("/")[2], "dtypes": ["torch.float32"],
                                    "training": False, "ids": load_model("organism-a").tokenizer.encode(" When Mary")}


def test_the_second_time_nobody_is_asked(find, hub):
    first = find("gpt2")
    assert len(hub.asked_for("/store/")) == 1
    hub.log.clear()
    assert find("gpt2") == first and hub.log == []


def test_offline(find, hub):
    before = find("gpt2")
    hub.log.clear()
    cached, missing = find("gpt2", "gpt2-medium", HF_HUB_OFFLINE="1")
    assert cached == before and hub.log == []
    assert missing["refused"] == ("gpt2-medium: no embedded model (see circuit-gen models), no folder here, not whole in the hub's cache, and "
                                  "HF_HUB_OFFLINE keeps it from being downloaded: unset that, or pass its folder")


def test_a_hub_that_is_gone_does_not_matter_to_a_cached_model(find):
    assert find("gpt2") == find("gpt2", HF_ENDPOINT="http://127.0.0.1:9")


def test_what_is_cached_stays_when_the_hub_moves_on(find, hub, published):
    before = find("gpt2")
    hub.publish("openai-community/gpt2", files_of(published["gpt2-medium"][1]))
    assert find("gpt2") == before


def test_all_files_are_of_one_commit(find, hub, published):
    newer = files_of(published["gpt2-medium"][1])
    hub.then["config.json"] = lambda: hub.publish("openai-community/gpt2", newer)
    assert model_hash(found(find("gpt2"))) == model_hash(published["gpt2"][0])


def test_revisions(find, hub, published, tmp_path):
    name, files = "EleutherAI/pythia-160m", files_of(saved(gpt2(3), tmp_path / "earlier"))
    step = commit(files)
    hub.publish(name, files, "step1000")
    main, earlier, same, unknown = find(name, f"{name}@step1000", f"{name}@{step}", f"{name}@step7")
    assert earlier == same and found(earlier).name == step
    assert model_hash(found(earlier)) == model_hash(gpt2(3)) != model_hash(found(main)) == model_hash(published[name][0])
    assert unknown["refused"].endswith("has it, but not at this revision: check what comes after the @")
    assert find(f"{name}@step1000", HF_HUB_OFFLINE="1") == earlier
    with pytest.raises(ModelError, match="no such folder"): find_model("gpt2@a/b")


def test_numbered_pieces(find, hub, tmp_path):
    hub.publish("some/pieces", files_of(saved(gpt2(4), tmp_path / "pieces", max_shard_size="200KB")))
    folder = found(find("some/pieces"))
    pieces = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(pieces) > 1 and model_hash(folder) == model_hash(gpt2(4))
    link_of(folder, pieces[0]).unlink()
    hub.log.clear()
    assert found(find("some/pieces")) == folder and model_hash(folder) == model_hash(gpt2(4))
    assert len(hub.asked_for("/store/")) == 1, "only the piece that was missing"


def test_several_at_once(settings, published):
    running = [subprocess.Popen([sys.executable, "-c", FIND, "gpt2-medium"], env=settings, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0] for process in running}
    assert len(said) == 1 and model_hash(found(json.loads(said.pop()))) == model_hash(published["gpt2-medium"][0])


# what another program cached

@pytest.mark.slow
def test_what_transformers_cached_is_completed_and_not_loaded_again(settings, find, hub, published):
    loaded = python("from transformers import AutoModelForCausalLM as A; A.from_pretrained('gpt2')", settings=settings)
    assert loaded.returncode == 0, loaded.stderr
    without = found(find("gpt2", HF_HUB_OFFLINE="1"))
    assert load_model(without).tokenizer is None and model_hash(without) == model_hash(published["gpt2"][0])
    hub.log.clear()
    newer = files_of(published["gpt2-medium"][1])
    hub.publish("openai-community/gpt2", {name: content for name, content in newer.items() if name not in TOKENIZER})
    assert found(find("gpt2")) == without and load_model(without).tokenizer is not None
    assert hub.asked_for("/store/") == []


# a download that breaks off

WEIGHTS = "model.safetensors"


def test_a_connection_that_breaks_once_is_taken_up_where_it_was(find, hub, published):
    hub.cuts[WEIGHTS] = iter([15_000_000])
    folder = found(find("gpt2-medium"))
    ranges = [entry[2] for entry in hub.asked_for("/store/")]
    assert ranges[0] is None and re.fullmatch(r"bytes=[1-9]\d+-", ranges[1]) and len(ranges) == 2
    assert model_hash(folder) == model_hash(published["gpt2-medium"][0])


@pytest.mark.slow
def test_a_download_that_breaks_off_is_said_and_tried_again(find, hub, published, tmp_path):
    hub.cuts[WEIGHTS] = chain([100_000], repeat(0))
    said = find("gpt2")["refused"]
    assert said.startswith("gpt2: the download of model.safetensors broke off (RemoteProtocolError: ")
    assert said.endswith("): try again; the files that came whole are kept")
    kept = {path.stat().st_size for path in tmp_path.glob("home/hub/models--gpt2/blobs/*")}
    assert kept == {len(content) for name, content in files_of(published["gpt2"][1]).items() if name.endswith(".json")}
    del hub.cuts[WEIGHTS]
    hub.log.clear()
    assert model_hash(found(find("gpt2"))) == model_hash(published["gpt2"][0])
    assert hub.asked_for("tokenizer") == []


def test_a_download_that_was_killed_is_begun_again(find, hub, settings, published):
    hub.held[WEIGHTS] = 100_000
    process = subprocess.Popen([sys.executable, "-c", FIND, "gpt2"], env=settings)
    while not hub.asked_for("/store/"): time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.held.clear()
    assert model_hash(found(find("gpt2"))) == model_hash(published["gpt2"][0])


# bytes that are not what was promised

def test_another_size_than_announced(find, hub, published, tmp_path):
    size = len(files_of(published["gpt2"][1])[WEIGHTS])
    hub.announced[WEIGHTS] = {"X-Linked-Size": str(size + 1)}
    assert f"should be of size {size + 1} but has size {size}" in find("gpt2")["refused"]
    assert not list(tmp_path.rglob(WEIGHTS))
    hub.announced.clear()
    assert model_hash(found(find("gpt2"))) == model_hash(published["gpt2"][0])


def test_another_hash_than_announced(find, hub, published, tmp_path):
    hub.announced[WEIGHTS] = {"X-Linked-ETag": f'"{"ab" * 32}"'}
    said = find("gpt2")["refused"]
    blob = tmp_path / "home" / "hub" / "models--gpt2" / "blobs" / ("ab" * 32)
    assert said.startswith("gpt2: model.safetensors is not what the hub promised") and said.endswith(f"delete {blob} and try again")
    assert find("gpt2", HF_HUB_OFFLINE="1")["refused"] == said, "nor when it is in the cache"
    hub.announced.clear()
    blob.unlink()
    assert model_hash(found(find("gpt2"))) == model_hash(published["gpt2"][0])


def test_damage_in_the_cache(find, published):
    folder = found(find("gpt2"))
    blob, whole = link_of(folder), link_of(folder).read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        blob.write_bytes(damaged)
        assert find("gpt2")["refused"].endswith(f"it was damaged on the way or since; delete {blob} and try again")
    blob.unlink()
    assert found(find("gpt2")) == folder and model_hash(folder) == model_hash(published["gpt2"][0])


def test_a_file_that_several_repositories_share(find):
    folder = found(find("gpt2"))
    blob, store = link_of(folder), folder.parents[2] / "blobs" / "cd" / ("cd" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    assert found(find("gpt2")) == folder
    store.write_bytes(b"damaged")
    assert str(store) in find("gpt2")["refused"]


def test_a_cache_without_links(find, hub, published):
    folder = found(find("gpt2", HF_HUB_DISABLE_SYMLINKS="1"))
    assert not (folder / WEIGHTS).is_symlink() and model_hash(folder) == model_hash(published["gpt2"][0])
    hub.log.clear()
    assert found(find("gpt2")) == folder and hub.log == []


# repositories that cannot become a model

def test_what_a_repository_lacks_is_said_before_anything_is_downloaded(find, hub):
    hub.publish("some/pickle", {"config.json": b"{}", "pytorch_model.bin": b"pickled"})
    hub.publish("some/dataset", {"data.json": b"{}", "README.md": b""})
    hub.publish("some/adapter", {"config.json": b"{}", "adapter_model.safetensors": b""})
    pickle, dataset, adapter = (answer["refused"] for answer in find("some/pickle", "some/dataset", "some/adapter"))
    assert pickle.startswith("some/pickle: it has only a pickle (pytorch_model.bin), which can run code when opened, and no model.safetensors: ")
    assert dataset.startswith("some/dataset: it has no config.json")
    assert adapter.startswith("some/adapter: it has no model.safetensors")
    assert hub.asked_for("/resolve/") == hub.asked_for("/resolve/", "HEAD") == []


def test_no_tokenizer(find, hub, tmp_path):
    hub.publish("some/ids", files_of(saved(random_gpt2(), tmp_path / "ids", tokenizer=False)))
    folder = found(find("some/ids"))
    assert load_model(folder).tokenizer is None
    hub.log.clear()
    assert found(find("some/ids")) == folder and hub.asked_for("/resolve/") == []
    assert found(find("some/ids", HF_ENDPOINT="http://127.0.0.1:9")) == folder


@pytest.mark.parametrize("own_type", [True, False])
def test_code_that_comes_with_a_model_is_not_even_fetched(find, hub, tmp_path, own_type):
    files, marker = files_of(saved(random_gpt2(), tmp_path / "poisoned")), tmp_path / "it ran"
    changes = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}} | ({"model_type": "evil"} if own_type else {})
    for name, more in {"config.json": changes, "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.C", None]}}}.items():
        files[name] = json.dumps(json.loads(files[name]) | more).encode()
    files["evil.py"] = f"open({str(marker)!r}, 'w')\nclass C: pass\n".encode()
    hub.publish("some/poisoned", files)
    folder = found(find("some/poisoned"))
    assert not (folder / "evil.py").exists() and hub.asked_for("evil.py") == hub.asked_for("evil.py", "HEAD") == []
    (folder / "evil.py").write_bytes(files["evil.py"])  # not even if it were there
    if own_type:
        with pytest.raises(ModelError, match="code that comes with a model is never run"): load_model(folder)
    else: assert model_hash(folder) == model_hash(random_gpt2())
    assert not marker.exists()


# a hub that does not give it

def test_what_a_hub_refuses(find, hub, published):
    hub.refusals = {"/api/models/some/absent": (404, {"X-Error-Code": "RepoNotFound"}), "/api/models/some/busy": (503, {}),
                    "/api/models/some/gateway": (404, {}),
                    "/api/models/some/page": (200, {"Content-Type": "text/html"}), "/some/gated/resolve": (403, {"X-Error-Code": "GatedRepo"})}
    hub.publish("some/gated", files_of(published["gpt2"][1]))
    names = ["nobody/nothing", "some/absent", "some/gated", "some/busy", "some/gateway", "some/page", "two words"]
    unknown, absent, gated, busy, gateway, page, no_name = (answer["refused"] for answer in find(*names))
    nowhere = "no embedded model (see circuit-gen models), no folder here, not whole in the hub's cache, and "
    private = f"the model hub ({hub.url}) does not know it, or keeps it private: check the name, or log in with hf auth login"
    assert unknown == f"nobody/nothing: {nowhere}{private}" and absent == f"some/absent: {nowhere}{private}"
    assert gated.startswith(f"some/gated: the model hub ({hub.url}) gives it only to those who accepted its conditions")
    assert busy == f"some/busy: {nowhere}the model hub ({hub.url}) answers 503: try again later"
    assert gateway == f"some/gateway: {nowhere}{hub.url} answers 404, and not as a model hub does: check HF_ENDPOINT and the network"
    assert page.startswith(f"some/page: {nowhere}{hub.url} answers, but not as a model hub does (KeyError: ")
    assert no_name == "two words: not a name that a model hub could know"


def test_nobody_listens(find):
    said = find("gpt2", HF_ENDPOINT="http://127.0.0.1:9")["refused"]
    assert said.startswith(
        "gpt2: no embedded model (see circuit-gen models), no folder here, not whole in the hub's cache, and the model hub cannot be reached "
        "(http://127.0.0.1:9: ConnectError: ") and said.endswith("): download it elsewhere and pass its folder")
    assert "cannot be reached (nonsense: UnsupportedProtocol: " in find("gpt2", HF_ENDPOINT="nonsense")["refused"]


def trickle(server):
    """One byte of an endless header now and then: never late by a client's own clock."""
    connection, _ = server.accept()
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True: connection.sendall(b"."), time.sleep(0.5)
    except OSError: pass


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(hub, settings, tmp_path):
    hub.silent = True
    with socket.create_server(("127.0.0.1", 0)) as slow:
        for _ in range(2): threading.Thread(target=trickle, args=[slow], daemon=True).start()
        commands = [[sys.executable, "-c", FIND, "gpt2"]] * 2 + [[PROGRAM, "discover", "--model", "gpt2", "--out", tmp_path / "out.json"]]
        endpoints = [f"http://127.0.0.1:{slow.getsockname()[1]}", hub.url, hub.url]
        started = [subprocess.Popen(command, env=settings | {"HF_ENDPOINT": endpoint}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                   for command, endpoint in zip(commands, endpoints)]
        trickled, silent, program = (process.communicate(timeout=120) for process in started)
    said = ": no answer in 6 s): download it elsewhere and pass its folder"
    assert trickled[0].endswith(f'{said}"}}\n') and silent[0].endswith(f'{said}"}}\n')
    assert program[0] == "" and program[1].startswith("circuit-gen: gpt2: ") and program[1].endswith(f"{said}\n") and program[1].count("\n") == 1
    assert started[2].returncode == 2 and list(tmp_path.glob("out*")) == []


# the command line

@pytest.mark.slow
def test_the_command_line_refuses_in_one_line(hub, settings, tmp_path, published):
    evil = files_of(published["gpt2"][1]) | {"config.json": b'{"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.C"}}'}
    hub.publish("some/poisoned", evil)
    hub.publish("some/pickle", {"config.json": b"{}", "pytorch_model.bin": b"pickled"})
    hub.publish("some/ids", {name: content for name, content in files_of(published["gpt2"][1]).items() if name not in TOKENIZER})
    hub.cuts[WEIGHTS] = chain(repeat(None, 2), [100_000], repeat(0))  # whole for the first two that get so far
    names = {"nobody/nothing": "check the name", "some/poisoned": "never run", "some/pickle": "only a pickle", "some/ids": "tokenizer",
             "compiled-oii": "did you mean compiled-ioi?", "gpt2": "broke off"}
    commands = [["discover", "--model", name, "--out", str(tmp_path / "out.json")] for name in names]
    done = python(COMMANDS, json.dumps(commands), settings=settings)
    lines = done.stderr.splitlines()
    assert done.stdout.split() == ["2"] * len(names) and len(lines) == len(names), done.stderr
    for line, (name, reason) in zip(lines, names.items()):
        assert line.startswith("circuit-gen: ") and reason in line
        assert name.rpartition("/")[2] in line
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.slow
def test_a_manifest_tells_a_model_by_its_weights_wherever_they_came_from(hub, settings, tmp_path):
    organism = embedded_models()["organism-a"]
    hub.publish("some/organism", files_of(organism))
    shutil.copytree(organism, tmp_path / "copied")
    hashes = set()
    for i, name in enumerate(["some/organism", str(tmp_path / "copied")]):
        options = "--axes lexical --variants rare_names --ablation zero --positions listed --levels node --n-prompts 2 --n-random 0".split()
        command = [PROGRAM, "measure", "--model", name, "--circuit", "organism-a-ioi", *options, "--out", out := tmp_path / str(i)]
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hashes.add(json.loads((out / "manifest.json").read_text(encoding="utf-8"))["hashes"]["model"])
    assert hashes == {model_hash("organism-a")}


# the parts, without a hub

NAMES = st.sampled_from([
    "config.json", "vocab.json", "merges.txt", "tokenizer.model", "model.safetensors", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "x.safetensors", "onnx/config.json", "onnx/model.safetensors", "evil.py", "a.bin", "README.md"])


@given(st.lists(NAMES, unique=True))
def test_files_that_are_wanted(listed):
    weights = {name for name in listed if name.startswith("model") and name.endswith(".safetensors")}
    if "config.json" not in listed or not weights:
        with pytest.raises(ModelError): wanted_files(listed)
        return
    wanted = wanted_files(iter(listed))
    last = {"model.safetensors"} & weights or weights
    assert set(wanted[-len(last):]) == last and wanted == wanted_files(reversed(listed))
    assert set(wanted) - last == set(listed) & {"config.json", "vocab.json", "merges.txt", "tokenizer.model"}


@pytest.mark.parametrize("names, whole", [
    ([], False), (["model.safetensors"], True), (["other.safetensors"], False), (["model-00001-of-00002.safetensors"], False),
    (["model-00002-of-00002.safetensors"], False), ([f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], True),
])
def test_weights_are_there_in_all_their_pieces(tmp_path, names, whole):
    for name in names: (tmp_path / name).touch()
    assert has_weights(tmp_path) == whole
    for name in names:
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    assert not has_weights(tmp_path), "links to nothing are no files"


def test_within_gives_what_the_function_gives():
    assert within(60, lambda: 3) == 3
    with pytest.raises(KeyError, match="its own"): within(60, lambda: {}["its own"])
    with pytest.raises(TimeoutError): within(0.01, threading.Event().wait)
