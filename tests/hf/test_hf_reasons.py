"""What cannot work is refused with the true reason."""

import pytest
import torch
import transformers
from contract.families import C, adapted, plain, tokens

import inplace_ttt as ittt
from inplace_ttt.hf.families import WITHOUT_MLP

IDS = tokens(2, 2 * C + 3)


@pytest.mark.parametrize("method", ["PrefixTuningConfig", "CartridgeConfig"])
@pytest.mark.parametrize("order", ["attach first", "peft first"])
def test_keys_and_values_of_no_text(method, order):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, method):
        pytest.skip(f"this peft has no {method}")
    settings = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = adapted("llama") if order == "attach first" else plain("llama")
    wrapped = peft.get_peft_model(model, settings)
    if order == "peft first":
        ittt.attach(wrapped, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C))
    with pytest.raises(ValueError, match="by prefix tuning or a cartridge, whose keys and values come from no text"):
        wrapped(input_ids=IDS)


@pytest.mark.parametrize("how", ["set_input_embeddings", "modules_to_save"])
def test_embeddings_replaced_after_attach(how):
    peft = pytest.importorskip("peft")
    model = adapted("llama")
    if how == "set_input_embeddings":
        model.set_input_embeddings(torch.nn.Embedding(97, 32, dtype=torch.float64))
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(RuntimeError, match="was the embedding module replaced"):
        model(input_ids=IDS)


@pytest.mark.parametrize("model_type", WITHOUT_MLP)
def test_layers_without_an_mlp_module(model_type):
    config = transformers.AutoConfig.for_model(model_type, vocab_size=97, num_hidden_layers=2, num_layers=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert any(name.endswith("layers.0.fc2") for name, _ in model.named_modules())
    with pytest.raises(
        ittt.UserError, match=f"'{model_type}' cannot adapt: its last projection lies on the decoder layer"
    ):
        ittt.attach(model)
