import pytest

from dimaskdino.structures import Stage, decoder_stages, is_final_loss


def test_names_losses_and_titles():
    stages = [Stage("interm"), Stage("di", 1), Stage("selection", 2), *decoder_stages(2, initial=True)]
    assert [stage.name for stage in stages] == ["interm", "di.1", "selection.2", "initial", "layer.0", "layer.1"]
    assert [stage.loss_suffix for stage in stages] == ["_interm", "_di_1", "_selection_2", "_0", "_1", ""]
    assert [stage.title for stage in stages] == [
        "first selection",
        "token interaction layer 1",
        "second selection",
        "queries before layer 0",
        "decoder layer 0",
        "decoder layer 1",
    ]


def test_losses_are_numbered_from_layer_0_without_initial_prediction():
    assert [stage.loss_suffix for stage in decoder_stages(3, initial=False)] == ["_0", "_1", ""]


def test_denoising_stages_have_their_own_names_and_losses():
    first, last = (stage.of_denoising() for stage in decoder_stages(2, initial=False))
    assert (first.name, first.loss_suffix) == ("dn.layer.0", "_dn_0")
    assert (last.name, last.loss_suffix, last.title) == ("dn.layer.1", "_dn", "decoder layer 1 (denoising)")


@pytest.mark.parametrize("name", ["interm", "di.0", "selection.12", "initial", "layer.3", "dn.initial", "dn.layer.0"])
def test_name_round_trip(name):
    assert Stage.from_name(name).name == name


@pytest.mark.parametrize("name", ["", "layer", "layer.", "layer.x", "layer.-1", "interm.0", "encoder", "dn."])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="layer.N"):
        Stage.from_name(name)


def test_order_is_the_order_of_prediction():
    names = ["layer.10", "selection.2", "initial", "layer.2", "interm"]
    ordered = [stage.name for stage in sorted(map(Stage.from_name, names), key=lambda stage: stage.order)]
    assert ordered == ["interm", "selection.2", "initial", "layer.2", "layer.10"]


def test_large_ordinals_are_written_as_numbers():
    assert Stage("selection", 5).title == "fifth selection"
    assert Stage("selection", 6).title == "6th selection"


def test_only_selections_precede_the_decoder():
    assert [Stage(kind).is_refined for kind in ("interm", "di", "selection", "initial", "layer")] == [
        False,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("stage", [Stage("interm"), Stage("di", 0), *decoder_stages(12, initial=True)[:-1]])
@pytest.mark.parametrize("denoising", [False, True])
def test_losses_of_earlier_stages_are_not_final(stage, denoising):
    stage = stage.of_denoising() if denoising else stage
    assert not is_final_loss(f"loss_mask{stage.loss_suffix}")


def test_losses_of_the_last_stage_and_users_terms_are_final():
    assert all(is_final_loss(name) for name in ("loss_ce", "loss_mask", "total_loss", "loss_edge_of_object"))
    assert not is_final_loss("loss_ce_dn")
