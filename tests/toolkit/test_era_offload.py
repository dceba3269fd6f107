"""gradroute.era on models that accelerate has offloaded: what is in the weights map is changed, or nothing is."""

import copy
import warnings

import model_zoo
import pytest
import torch

from gradroute import era, models
from gradroute.blocks import Block

accelerate = pytest.importorskip("accelerate")

ADDED = 6
OFFLOADED = ["cpu", "disk"]


def offloaded(model, how, folder):
    model = copy.deepcopy(model)
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


@pytest.fixture
def tokens():
    return torch.randint(3, model_zoo.VOCABULARY, (2, 10))


@pytest.mark.parametrize("how", OFFLOADED)
def test_every_step_does_what_it_does_in_memory(how, tokens, tmp_path):
    plain = model_zoo.build("phi3").bfloat16().eval()
    model = offloaded(plain, how, tmp_path / "weights")

    def assert_alike():
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert torch.equal(model_zoo.logits_of(model, tokens), model_zoo.logits_of(plain, tokens))
        for name, parameter in plain.named_parameters():
            ours = model.get_parameter(name)
            assert (ours.shape, ours.dtype) == (parameter.shape, parameter.dtype), name

    def both(call):
        torch.manual_seed(1)
        expected = call(plain)
        torch.manual_seed(1)
        got = call(model)
        assert_alike()
        return expected if got is None else got

    block = both(lambda one: era.expand(one, ADDED, zero_output=False))
    assert block.has_influence(model)
    state = block.state_dict(model)
    gates = [era.gate(one, block, 3.0) for one in (plain, model)]
    assert_alike()
    for gate in gates:  # after a forward, in which accelerate makes other parameters
        gate.remove()
    both(lambda one: era.ablate(one, block, how="resample"))
    both(lambda one: era.ablate(one, block))
    assert not block.has_influence(model)
    both(lambda one: era.contract(one, block))
    both(lambda one: era.merge(one, block, state))
    era.export(model, tmp_path / "folder", max_shard_size=20_000)
    loaded = type(plain).from_pretrained(tmp_path / "folder", attn_implementation="eager").eval()
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    for name, parameter in plain.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_tied_embeddings_stay_tied(tokens, tmp_path):
    config = model_zoo.build("llama").config
    config.tie_word_embeddings = True
    plain = type(model_zoo.build("llama"))(config).eval()
    model = offloaded(plain, "disk", tmp_path / "weights")
    era.ablate(model, Block.units(model, 4))
    era.ablate(plain, Block.units(plain, 4))
    assert torch.equal(model_zoo.logits_of(model, tokens), model_zoo.logits_of(plain, tokens))
    rows = Block.of(model, {"lm_head.weight": (0, 2)})
    with pytest.raises(
        TypeError, match=r"lm_head.weight: got a parameter that is tied and offloaded, expected one"
    ):
        era.ablate(model, rows)
    era.export(model, tmp_path / "folder")
    loaded = type(plain).from_pretrained(tmp_path / "folder", attn_implementation="eager").eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(model_zoo.logits_of(loaded, tokens), model_zoo.logits_of(plain, tokens))


def test_a_checkpoint_is_never_written_to(tokens, tmp_path):
    """Weights that are read from a checkpoint's own files go to the offload folder, and are refused without one."""
    plain = model_zoo.build("llama").eval()
    plain.save_pretrained(tmp_path / "checkpoint")
    (file,) = (tmp_path / "checkpoint").glob("*.safetensors")
    before = file.read_bytes()
    index = {
        name: {"safetensors_file": str(file), "weight_name": name, "dtype": "float32"}
        for name in plain.state_dict()
    }
    for folder in (tmp_path / "weights", None):
        model = copy.deepcopy(plain)
        loader = accelerate.utils.OffloadedWeightsLoader(index=index | {}, save_folder=folder)
        accelerate.hooks.attach_align_device_hook(model, "cpu", offload=True, weights_map=loader)
        block = Block.units(model, 4)
        if folder is None:
            with pytest.raises(
                TypeError, match=r"offloaded to a OffloadedWeightsLoader that cannot be written to"
            ):
                era.ablate(model, block)
        else:
            folder.mkdir()
            era.ablate(model, block, how="slice")
            expected = copy.deepcopy(plain)
            era.ablate(expected, block, how="slice")
            assert torch.equal(model_zoo.logits_of(model, tokens), model_zoo.logits_of(expected, tokens))
        assert file.read_bytes() == before


def test_what_a_route_does_not_see_is_not_taken_out_of_offloaded_layers(tmp_path):
    """Scaling what is on the meta device would have done nothing, silently."""
    model = model_zoo.build("llama")
    models.route(model, models.sgtm(model.config, forget_units=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(TypeError, match=r"got an offloaded parameter, expected one in memory"):
        models.ablate(model)
