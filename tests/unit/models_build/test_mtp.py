"""Multi-token prediction: what it is trained on, and the same losses as transformers' prediction layers."""

import pytest
import torch
import torch.nn.functional as F

from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.load import load_into
from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.models.build import BuildOptions, build_model
from mindspeed_llm.models.prediction_targets import further_targets, objective
from mindspeed_llm.parallel.setup import initialize_distributed

torch.set_num_threads(1)

IDS = torch.tensor([[11, 12, 13, 14, 21, 22, 23]])
LABELS = torch.tensor([[-100, 13, 14, -100, 22, 23, 24]])
BOUNDS = torch.tensor([0, 4, 4, 7], dtype=torch.int32)


def test_tokens_and_labels_are_moved_within_a_row():
    (ids, labels), (ids_2, labels_2) = further_targets(IDS, LABELS, None, 2)
    assert ids.tolist() == [[12, 13, 14, 21, 22, 23, 0]]
    assert labels.tolist() == [[13, 14, -100, 22, 23, 24, -100]]
    assert ids_2.tolist() == [[13, 14, 21, 22, 23, 0, 0]]
    assert labels_2.tolist() == [[14, -100, 22, 23, 24, -100, -100]]


def test_no_document_sees_the_next_one():
    (ids, labels), (ids_2, labels_2) = further_targets(IDS, LABELS, BOUNDS, 2)
    assert ids.tolist() == [[12, 13, 14, 0, 22, 23, 0]]
    assert labels.tolist() == [[13, 14, -100, -100, 23, 24, -100]]
    assert ids_2.tolist() == [[13, 14, 0, 0, 23, 0, 0]]
    assert labels_2.tolist() == [[14, -100, -100, -100, 24, -100, -100]]


def test_the_objective_adds_the_mean_of_the_prediction_losses():
    assert float(objective(torch.tensor([2.0, 3.0, 5.0]), 0.1)) == pytest.approx(2.0 + 0.1 * 4.0)
    assert float(objective(torch.tensor(2.0), 0.1)) == 2.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_toy("deepseek_v3", tmp_path_factory.mktemp("v3") / "model", num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def model(directory):
    initialize_distributed()
    source = HfSource(directory)
    built = build_model(source.shape, BuildOptions(initialize=False))
    load_into(built, source, quiet=True)
    return built


def random_ids(*shape):
    return torch.randint(0, 997, shape, generator=torch.Generator().manual_seed(3))


def test_losses_are_those_of_transformers(directory, model):
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    ids = random_ids(1, 14)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    main = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    # transformers looks for DeepSeek-V3's own layer 61; here the prediction layers are 4 and 5
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[45]\..*"]
    main.config.num_mtp_layers = 2
    theirs = MtpModel.from_pretrained(main).eval()
    with torch.no_grad():
        out = main(ids, output_hidden_states=True)
        hidden = out.hidden_states[-1]
        expected = [F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="sum")]
        for depth in (1, 2):
            positions = torch.arange(depth, ids.shape[1])[None]
            hidden = theirs.forward_layer(depth - 1, hidden[:, :-1], positions, None, input_ids=ids[:, depth:])
            logits = theirs._project_to_logits(hidden)
            expected.append(F.cross_entropy(logits[0, :-1], ids[0, depth + 1 :], reduction="sum"))
        found = model(ids, labels=labels)
    assert found.tolist() == pytest.approx([float(loss) for loss in expected], rel=1e-5)


def test_a_packed_row_is_its_documents_one_by_one(model):
    from megatron.core.packed_seq_params import PackedSeqParams

    ids, labels = random_ids(1, 20), random_ids(1, 20).flip(1)
    labels[0, ::5] = -100
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    with torch.no_grad():
        together = model(ids, labels=labels, packed_seq_params=packed)
        pieces = [model(ids[:, a:b], labels=labels[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
        apart = model(ids, labels=labels)
    torch.testing.assert_close(together, sum(pieces), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(together[1:], apart[1:], rtol=1e-3)


def test_the_weight_decides_how_much_the_prediction_layers_move_the_model(model):
    ids, labels = random_ids(2, 10), random_ids(2, 10).flip(1)

    def gradient(weight):
        model.zero_grad()
        objective(model(ids, labels=labels), weight).backward()
        return model.decoder.layers[0].self_attention.linear_kv_down_proj.weight.grad.clone()

    none, some, twice = (gradient(weight) for weight in (0.0, 0.3, 0.6))
    torch.testing.assert_close(twice - none, 2 * (some - none), rtol=1e-3, atol=1e-4)
    assert float((some - none).abs().max() / none.abs().max()) > 1e-2


def test_logits_need_no_prediction_layers(model):
    model.eval()
    with torch.no_grad():
        assert model(random_ids(1, 5), gather_logits=True).shape == (1, 5, 997)
    model.train()
