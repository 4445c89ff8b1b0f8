"""`forwax finetune` on a tiny model without a network: every combination, resuming, mistakes."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax import adapters, lm
from forwax.lab import cli, style
from forwax.lab.catalogue.settings import Settings
from forwax.lab.data import cache_dir
from forwax.lab.finetune import models, prefixes, problem, results, run
from forwax.lab.options.finetune import FinetuneOptions
from forwax.lab.texts import sets as texts
from forwax.lab.training.program import CompiledTraining, build_trainer

pytestmark = pytest.mark.usefixtures("compile_once")

TINY = ["--model", "tiny-random", "--data", "tiny-sentences"]
FEW = ["--steps", "4", "--batch-size", "4", "--test-texts", "8"]
RATE = ["--learning-rate", "0.01"]
RULES = ("activity", "learned-feedback", "rank-1", "mezo", "backprop")


@pytest.fixture(autouse=True)
def picture(monkeypatch):
    """Pictures are drawn and not painted; gives what paints them."""
    plain = style.save
    monkeypatch.setattr(style, "save", lambda figure, path: path.write_bytes(b""))
    return plain


@pytest.fixture
def finetune(tmp_path, capsys):
    """Runs the command and gives its exit code, what it printed, and its run's folder."""

    def call(*words: str) -> tuple[int, str, Path | None]:
        code = cli.main(["finetune", "--runs", str(tmp_path / "runs"), *words])
        found = capsys.readouterr()
        folders = sorted((tmp_path / "runs").glob("finetune-*"))
        return code, found.out + found.err, folders[-1] if folders else None

    return call


def arrays(folder: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    return safetensors.numpy.load_file(folder / run.ADAPTER)


OFFERED = [
    (adapter, task, rule)
    for adapter, task in (
        ("last-token", "classify"),
        ("lora", "classify"),
        ("full", "classify"),
        ("last-token", "next-token"),
        ("lora", "next-token"),
        ("full", "next-token"),
    )
    for rule in RULES
]
PAINTED = ("full", "backprop")
"""The adapter and the rule, under both tasks, whose picture is painted."""


@pytest.mark.parametrize(("adapter", "task", "rule"), OFFERED)
def test_every_combination_trains(adapter, task, rule, finetune, picture, monkeypatch):
    if (adapter, rule) == PAINTED:
        monkeypatch.setattr(style, "save", picture)
    words = ("--adapter", adapter, "--task", task, "--rule", rule)
    code, out, folder = finetune(*TINY, *FEW, *RATE, *words)
    assert code == 0
    names = {"config.json", "metrics.jsonl", "curves.png", "summary.json", run.ADAPTER}
    assert names | {"checkpoints"} == {path.name for path in folder.iterdir()}
    painted = (folder / "curves.png").read_bytes()
    assert painted[1:4] == (b"PNG" if (adapter, rule) == PAINTED else b"")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_loss"] != summary["test_loss_before"]
    assert f"Test loss {summary['test_loss_before']:.3f} before" in out
    if task == "classify":
        assert 0 <= summary["test_accuracy_shifted"] <= 1
        assert summary["test_share_of_commonest"] >= 0.5
        assert "the commonest class alone" in out
    else:
        assert summary["test_accuracy"] is None
        assert "accuracy" not in out
    assert summary["inference_bytes"] > 0
    assert summary["process_peak_bytes"] > 1e8
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sum("validation_loss" in row for row in rows) == 4
    assert sum("loss" in row for row in rows) == 4
    if adapter == "full":
        assert arrays(folder)["layers.attn_q"].shape == (2, 32, 32)
    else:
        loaded = adapters.load(folder / run.ADAPTER, config=models.tiny().config)
        assert jax.tree.leaves(loaded)


KILLED = """
import os, signal, sys
from forwax.lab import cli
from forwax.lab.catalogue.settings import Settings
from forwax.lab.training import folder
plain = folder.Checkpoints.save
def save(self, state, *others, **notes):
    plain(self, state, *others, **notes)
    if int(state.step) >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
folder.Checkpoints.save = save
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_bit_for_bit(finetune, tmp_path):
    words = [*TINY, *FEW, *RATE, "--rule", "learned-feedback", "--steps", "12"]
    _, _, whole = finetune(*words)
    place = ["--runs", str(tmp_path / "killed"), "--checkpoint-seconds", "0"]
    command = [sys.executable, "-c", KILLED, "finetune", *words, *place]
    assert subprocess.run(command, check=False).returncode == -9
    (folder,) = (tmp_path / "killed").iterdir()
    assert not (folder / "summary.json").exists()
    assert cli.main(["finetune", "--resume", str(folder)]) == 0
    assert_same(whole, folder)
    code, out, _ = finetune("--resume", str(folder))
    assert code == 0
    assert out.endswith(f"{folder} is finished already.\n")


KILLED_AT = """
import os, signal, sys
from forwax.lab import cli
left, folders, words = int(sys.argv[1]), sys.argv[2:4], sys.argv[4:]
def count(event, args):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.listdir"):
        if any(str(args[0]).startswith(folder) for folder in folders):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
sys.exit(cli.main(words))
"""
KILLS = 10
ACTIONS = 40
"""Each life makes more than these on its run's files and the kept prefixes, where it may end."""


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_bit_for_bit(finetune, tmp_path):
    """At random actions on files: while prefixes are kept, a checkpoint or a line is written."""
    words = [*TINY, *FEW, *RATE, "--steps", "24", "--checkpoint-seconds", "0"]
    _, _, whole = finetune(*words)
    runs = tmp_path / "killed"
    own = [*words, "--runs", str(runs)]
    random = np.random.default_rng(0)
    steps = []
    for left in random.integers(1, ACTIONS, KILLS):
        found = [*runs.glob("finetune-*/config.json")]
        asked = ["--resume", str(found[0].parent)] if found else own
        asked += ["--checkpoint-seconds", "0"] if found else []
        command = [sys.executable, "-c", KILLED_AT, str(left), str(runs)]
        command += [str(cache_dir()), "finetune", *asked]
        ended = subprocess.run(command, capture_output=True, check=False)
        assert ended.returncode == -9, ended.stderr
        steps += [ended.stdout.decode().count("From step")]
    (folder,) = (path.parent for path in runs.glob("finetune-*/config.json"))
    assert 2 < sum(steps) < KILLS  # some before their first step, some behind it
    assert not (folder / "summary.json").exists()
    assert cli.main(["finetune", "--resume", str(folder)]) == 0
    assert_same(whole, folder)


def assert_same(whole: Path, folder: Path) -> None:
    """Two runs ended with the same bits."""
    first, second = (arrays(each)["weights"] for each in (whole, folder))
    assert first.tobytes() == second.tobytes()
    losses = [
        [json.loads(line).get("loss") for line in path.read_text().splitlines()]
        for path in (whole / "metrics.jsonl", folder / "metrics.jsonl")
    ]
    assert losses[0] == losses[1]


def test_a_run_killed_before_its_first_step_goes_on_bit_for_bit(finetune, monkeypatch):
    """While prefixes are cached, while the rate is measured, and when it is."""
    words = [*TINY, "--steps", "4"]
    code, out, whole = finetune(*words)
    assert code == 0
    assert "compiling, to measure a rate" in out

    def stop(*args, **options):
        raise KeyboardInterrupt

    place = (problem.prefixes, "cached")
    code, _, folder = stopped(finetune, monkeypatch, place, stop, *words)
    assert code == 130
    assert folder != whole
    resume = ("--resume", str(folder))
    for place in ((run.fx, "measure_curvature"), (run.Finetuning, "run")):
        code, out, again = stopped(finetune, monkeypatch, place, stop, *resume)
        assert (code, again) == (130, folder), out
    assert "compiling, to measure a rate" in out
    with monkeypatch.context() as patch:
        patch.setattr(run.fx, "measure_curvature", None)
        code, out, _ = finetune(*resume)
    assert code == 0
    rates = [
        json.loads((each / "summary.json").read_text())["learning_rate"]
        for each in (whole, folder)
    ]
    assert rates[0] == rates[1]
    first, second = (arrays(each)["weights"] for each in (whole, folder))
    assert first.tobytes() == second.tobytes()


def stopped(finetune, monkeypatch, place, stop, *words):
    with monkeypatch.context() as patch:
        patch.setattr(*place, stop)
        return finetune(*words)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_behind_its_step(sent, finetune, monkeypatch):
    plain = run.Finetuning.at_stop

    def at_stop(self):
        plain(self)
        if self.trainer.step == 2:
            signal.raise_signal(sent)

    monkeypatch.setattr(run.Finetuning, "at_stop", at_stop)
    code, out, folder = finetune(*TINY, *FEW, *RATE)
    assert code == 128 + sent
    assert out.endswith(
        f"Stopped at step 2 of 4; go on with: forwax finetune --resume {folder}\n"
    )


def test_a_loss_that_is_not_finite_ends_a_run(finetune):
    code, out, folder = finetune(*TINY, *FEW, "--learning-rate", "1e38")
    assert code == 3
    assert "was not made because its loss or gradient is not finite" in out
    assert "try a smaller --learning-rate, say 3e+37; it was 1e+38." in out
    assert not (folder / "summary.json").exists()


def test_a_run_goes_on_with_its_own_settings_and_texts(finetune, tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"Number {n},{'odd' if n % 2 else 'even'}\n" for n in range(40)]
    path.write_text("text,label\n" + "".join(rows))
    words = ("--model", "tiny-random", "--data", str(path), *FEW, *RATE)
    _, _, folder = finetune(*words, "--labels", "e", "o")
    (folder / "summary.json").unlink()
    code, out, _ = finetune("--resume", str(folder), "--steps", "9")
    assert code == 2
    assert "--resume takes every setting from the run's config.json" in out
    path.write_text("text,label\n" + "".join(reversed(rows)))
    code, out, _ = finetune("--resume", str(folder))
    assert code == 2
    assert "The texts or the model are not those that" in out


def test_print_config_is_what_a_run_keeps_and_starts_nothing(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(problem.prefixes, "cached", None)
    words = ["finetune", *TINY, *FEW, *RATE, "--runs", str(tmp_path), "--print-config"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    config = json.loads(out)
    assert not [*tmp_path.iterdir()]
    assert (config["rule"], config["steps"], err) == ("activity", 4, "")
    assert config["options"]["model"] == "tiny-random"
    monkeypatch.setattr(run.Ready, "with_prefixes", lambda ready: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(words[:-1])
    (folder,) = tmp_path.iterdir()
    kept = json.loads((folder / "config.json").read_text())
    kept.pop("sha256")
    assert config == kept
    capsys.readouterr()
    assert cli.main(["finetune", "--resume", str(folder), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out) == kept


def test_a_rate_is_measured_and_a_comparison_prints_one_table(finetune):
    words = ("--compare", "mezo", "backprop", "--trials", "2")
    code, out, folder = finetune(*TINY, "--steps", "4", *words)
    assert (code, "compiling, to measure a rate" in out) == (0, True)
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["rule"] for row in summary["rules"]] == ["activity", "mezo", "backprop"]
    before = {row["test_accuracy_before"] for row in summary["rules"]}
    assert len(before) == 1
    for row in summary["rules"]:
        assert len(row["search"]) == 2
        assert row["learning_rate"] > 0
        assert (folder / f"{row['rule']}-{run.ADAPTER}").exists()
    table = (folder / "table.md").read_text()
    assert "| backprop |" in table
    assert "each rate the best of 2" in table
    # what is finished is not done again
    (folder / "summary.json").unlink()
    parts = {p: p.stat().st_mtime_ns for p in (folder / "parts").iterdir()}
    code, again, _ = finetune("--resume", str(folder))
    assert code == 0
    assert "compiling" not in again
    assert parts == {p: p.stat().st_mtime_ns for p in (folder / "parts").iterdir()}


def task(**options) -> problem.Tuning:
    asked = FinetuneOptions(
        model="tiny-random", data="tiny-sentences", batch_size=4, **options
    )
    model = models.load("tiny-random", asked.packed)
    made = problem.build(model, texts.load("tiny-sentences"), asked)
    return problem.with_prefixes(made, model)


def in_place(rule: str, adapter: str = "full") -> tuple[problem.Tuning, Settings]:
    """A task on texts of two bytes, beside whose states the parameters are large."""
    asked = FinetuneOptions(
        model="tiny-random", batch_size=2, adapter=adapter, rule=rule, template="{text}"
    )
    pairs = [chr(97 + n // 26) + chr(97 + n % 26) for n in range(60)]
    found = texts.Texts("pairs", tuple(pairs), np.arange(60, dtype=np.int32) % 2)
    built = problem.build(models.load("tiny-random", packed=False), found, asked)
    return built, asked.settings(rule, 0.01)


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("rule", ["mezo", "rank-1"])
def test_a_step_in_place_is_the_gradient_times_the_rate(rule, adapter, monkeypatch):
    built, settings = in_place(rule, adapter)
    trainers = [build_trainer(built, settings)]
    monkeypatch.setattr(problem.Tuning, "own_step", lambda *_: None)
    trainers.append(build_trainer(built, settings))
    for trainer in trainers:
        trainer.run(3)
    first, second = (jax.tree.leaves(each.state.params) for each in trainers)
    for got, wanted, start in zip(
        first, second, jax.tree.leaves(built.init(None)), strict=True
    ):
        moved = jnp.abs(wanted - start).max()
        assert moved > 0
        # two evaluations differ in their last bits, of which a slope is made
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3 * moved)


def test_a_step_in_place_that_is_not_finite_is_not_made():
    built, settings = in_place("mezo")
    broken = replace(
        built, init=lambda key: jax.tree.map(lambda x: x * jnp.inf, built.init(key))
    )
    trainer = build_trainer(broken, settings)
    before = jax.device_get(trainer.state.params)
    block = trainer.run(2)
    assert len(block.losses) == trainer.step == 0
    assert block.stopped_by is not None
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, before)


def test_parts_share_no_text_and_no_number_of_texts_changes_the_others():
    parts = task(adapter="lora")
    found = [
        {row.tobytes() for row in rows.own["tokens"]}
        for rows, _ in (parts.train, parts.validation, parts.test)
    ]
    assert [len(each) for each in found] == [36, 9, 27]
    assert len(set.union(*found)) == 72


@pytest.mark.parametrize("credit", ["own", "later"])
def test_texts_of_several_lengths_have_a_slope_at_each_token(credit, monkeypatch):
    """Filling on the left hides from no rule that tokens hear of no later ones."""
    built = task(task="next-token", credit=credit)
    rows, labels = jax.tree.map(jnp.asarray, built.train)
    assert not rows.own["mask"].all()
    # the rule that training takes
    monkeypatch.setattr(problem, "estimator", lambda loss, rule, **_: lambda *_: rule)
    rule = built.gradient(fx.ActivityPerturbation())(None, None, rows, labels)
    explain = fx.explain(built.loss_beside, rule, has_aux=True, in_axes=problem.AXES)
    found = explain(built.init(None), rows.frozen, rows.own, labels).rows
    assert [row.credit for row in found] == [
        "one slope per example and position of axis 2, later terms"
        + (" decaying" if credit == "own" else ""),
        "exact error",
    ]
    assert built.credited(fx.Backprop()) == fx.Backprop()


@pytest.mark.parametrize(
    "options", [{"rule": "backprop"}, {"compare": ("backprop",)}, {}], ids=str
)
def test_backprop_computes_each_layer_again(options):
    built = task(adapter="lora", **options)
    rows, labels = built.batch(built.train, 0)
    own = jax.tree.map(lambda x: x[0], rows.own)
    loss = jax.make_jaxpr(built.loss_beside)
    program = str(loss(built.start, rows.frozen, own, labels[0]))
    has_one = "checkpoint" in program or "remat" in program
    assert has_one == bool(options)


def test_prefixes_are_kept_on_disk_and_damaged_ones_made_anew(monkeypatch):
    first = task(packed=True)
    files = sorted((cache_dir() / prefixes.FOLDER).iterdir())
    # blocks of 32 of 27, 9 and 36 texts
    assert len(files) == 4

    def forbidden(*args, **options):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(prefixes.adapters, "cached_prefix", forbidden)
        second = task(packed=True)
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    third = task(packed=True)
    for other in (second, third):
        assert other.checksum == first.checksum
        for a, b in zip(
            jax.tree.leaves(first.train[0].own),
            jax.tree.leaves(other.train[0].own),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    assert files[0].read_bytes() == whole


def test_a_full_disk_while_prefixes_are_kept(finetune, monkeypatch):
    plain = Path.write_bytes

    def full(self, content):
        if prefixes.FOLDER in self.parts:
            raise OSError(28, "No space left on device")
        return plain(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        code, out, folder = finetune(*TINY, *FEW, *RATE)
    assert code == 2
    assert "No space left on device; set FORWAX_CACHE to a folder that can be" in out
    assert not list((cache_dir() / prefixes.FOLDER).iterdir())
    # what was begun goes on when there is space
    code, _, _ = finetune("--resume", str(folder))
    assert code == 0


def test_by_prefix_and_packed_the_logits_are_those_of_the_model():
    model = models.tiny()
    of_bytes = task(adapter="lora")
    for packed, tolerance in ((False, 0.02), (True, 0.3)):
        tuning = task(packed=packed)
        *_, logits = tuning.scores(tuning.test)(tuning.init(jax.random.key(0)))
        rows = of_bytes.test[0].own
        whole = lm.forward(
            model.config, model.params, rows["tokens"], mask=rows["mask"]
        )
        words = model.tokenizer.encode("01")
        np.testing.assert_allclose(logits, whole[:, -1, words], atol=tolerance)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--layers", "3"], "expected a number of top layers in [1, 2], got 3."),
        (["--rank", "33"], "expected a rank in [1, 32], got 33."),
        (["--rank", "0"], "--rank must be at least 1, got 0."),
        (["--adapter", "full", "--packed"], "which --packed keeps as integers"),
        (["--labels", "a"], "one word for each of the 2 classes, negative, positive,"),
        (["--labels", "a", "bc"], "one token each, but 'bc' is 2 of tiny-random;"),
        (["--labels", "a", "a"], "--labels must differ, got a, a."),
        (["--template", "It was"], "--template must hold {text} where the text stands"),
        (
            ["--template", "{text}" + 60 * "."],
            "tiny-random sees 64 tokens, but the text",
        ),
        (["--max-tokens", "3"], "0 texts are too few for"),
        (["--train-texts", "70"], "72 texts are too few for"),
        (["--batch-size", "40"], "at most the 36 texts to train on, got 40."),
        (
            ["--compare", "activity"],
            "--compare must name rules other than --rule activity",
        ),
        (["--compare", "mezo", *RATE], "leave --learning-rate or --compare out."),
        (["--model", "gone.gguf"], "tiny-random, smollm2 or the path of a GGUF file"),
        (["--data", "gone.csv"], "'gone.csv', which is neither; choose one of"),
        (["--resume", "gone"], "--resume takes every setting from"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence(words, expected, finetune):
    code, out, folder = finetune(*TINY, *words)
    assert (code, folder) == (2, None)
    last = out.strip().splitlines()[-1]
    assert last.startswith("forwax: ")
    assert expected in last


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text\nA\nB\n", "--task classify needs a column label, which"),
        ("text,label\nA,1\nB,1\n", "needs two labels or more, but"),
        (
            "words,label\nA,1\n",
            "Expected the columns text and label, but the first line",
        ),
        ("text,label\nA,1\nB,0\n", "2 texts are too few for"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(
    content, expected, finetune, tmp_path
):
    path = tmp_path / "a.csv"
    path.write_text(content)
    code, out, _ = finetune("--model", "tiny-random", "--data", str(path))
    assert code == 2
    assert expected in out


def test_a_text_with_a_character_that_has_no_word(finetune, tmp_path, monkeypatch):
    """As control characters have none in SmolLM2's vocabulary."""
    byte = models.Bytes().encode
    inner = SimpleNamespace(encode=lambda text, **_: SimpleNamespace(ids=byte(text)))
    coder = lm.Tokenizer(inner, frozenset({0x13}))
    monkeypatch.setattr(models, "Bytes", lambda: coder)
    path = tmp_path / "a.csv"
    path.write_text("text,label\nFine.,1\nA film \x13 a bore.,0\n")
    code, out, folder = finetune("--model", "tiny-random", "--data", str(path))
    assert (code, folder) == (2, None)
    assert out.splitlines()[-1] == (
        "forwax: The text 'A film \\x13 a bore. It was': encode: the vocabulary has no word for "
        "the byte 0x13 of UTF-8, so expected a text without '\\x13'. Remove the character."
    )


def test_a_file_that_is_no_model(finetune, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    code, out, _ = finetune("--model", str(path), "--data", "tiny-sentences")
    assert code == 2
    assert "is foreign or truncated" in out


def test_a_missing_extra(finetune, monkeypatch):
    plain = run.importlib.util.find_spec
    monkeypatch.setattr(
        run.importlib.util,
        "find_spec",
        lambda name, *others: None if name == "gguf" else plain(name, *others),
    )
    code, out, _ = finetune(*TINY)
    assert code == 2
    assert out == (
        "forwax: gguf is not installed; forwax finetune needs: pip install 'forwax[lm]'.\n"
    )


# the last one, since what follows is compiled with optimisations too
@pytest.mark.usefixtures("optimised")
def test_steps_in_place_hold_no_gradient_and_no_second_copy():
    built, _ = in_place("mezo")
    held = {}
    for rule in ("mezo", "rank-1", "backprop"):
        settings = FinetuneOptions(batch_size=2).settings(rule, 0.01)
        block = CompiledTraining(built, settings).block
        held[rule] = results.memory(built, block)["step_bytes"]
    copy = 4 * built.num_parameters
    assert max(held["mezo"], held["rank-1"]) <= 0.3 * copy
    assert held["backprop"] > copy
