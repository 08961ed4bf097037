"""Weights and outputs of a tiny model of LAION-CLAP's own code, stored in the folder laion_clap.

    python -m tests.support.laion_clap_oracle FOLDER      writes them anew

needs the packages laion-clap, torchlibrosa, librosa and h5py, best in an environment of its own.
The tests need none of them: `epoch_7.pt` is a checkpoint as LAION's training writes it, and
`outputs.safetensors` holds inputs, embeddings and gradients.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

FOLDER = Path(__file__).parent / "laion_clap"
CHECKPOINT = FOLDER / "epoch_7.pt"
NUM_MEL_BINS, NUM_FRAMES, HOP_SAMPLES, NUM_TOKENS = 16, 64, 32, 10
AUDIO = {
    "patch_embeds_hidden_size": 8,
    "depths": [2, 2],
    "num_attention_heads": [2, 2],
    "hidden_size": 16,
    "num_mel_bins": NUM_MEL_BINS,
    "spec_size": 64,
    "window_size": 4,
}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 1,
}
EMBED_DIM = 12
# Parameters whose gradients are stored, by their names in LAION's code.
GRADIENTS = (
    "audio_branch.patch_embed.proj.weight",
    "audio_branch.layers.0.blocks.1.attn.qkv.weight",
    "audio_branch.layers.0.blocks.0.attn.relative_position_bias_table",
    "audio_branch.layers.1.blocks.0.mlp.fc2.weight",
    "audio_branch.bn0.weight",
    "audio_branch.layers.0.downsample.reduction.weight",
    "audio_projection.0.weight",
    "text_branch.embeddings.word_embeddings.weight",
    "text_branch.encoder.layer.1.attention.self.query.weight",
    "text_branch.pooler.dense.weight",
    "text_projection.2.bias",
)


def read_outputs() -> dict[str, torch.Tensor]:
    """Reads inputs, L2-normalised embeddings and gradients."""
    return load_file(FOLDER / "outputs.safetensors")


def build_laion_clap() -> torch.nn.Module:
    """Builds a tiny model of LAION's class; its sizes are numbers in LAION's code."""
    for name in ("laion_clap", "laion_clap.clap_module"):  # without the package's own start
        spec = importlib.util.find_spec(name)
        module = types.ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = module
    from laion_clap.clap_module import htsat, model
    from transformers import RobertaConfig, RobertaModel

    def build_htsat(config, enable_fusion, fusion_type):
        return htsat.HTSAT_Swin_Transformer(
            spec_size=AUDIO["spec_size"],
            patch_size=4,
            patch_stride=(4, 4),
            num_classes=config.class_num,
            embed_dim=AUDIO["patch_embeds_hidden_size"],
            depths=AUDIO["depths"],
            num_heads=AUDIO["num_attention_heads"],
            window_size=AUDIO["window_size"],
            config=config,
            enable_fusion=enable_fusion,
            fusion_type=fusion_type,
        )

    audio = model.CLAPAudioCfp(
        model_type="HTSAT",
        model_name="tiny",
        audio_length=NUM_FRAMES,
        sample_rate=4000,
        mel_bins=NUM_MEL_BINS,
        window_size=64,
        hop_size=HOP_SAMPLES,
        fmin=50,
        fmax=2000,
        class_num=3,
        clip_samples=NUM_FRAMES * HOP_SAMPLES,
    )
    text = model.CLAPTextCfg(
        context_length=NUM_TOKENS,
        vocab_size=TEXT["vocab_size"],
        width=TEXT["hidden_size"],
        heads=2,
        layers=1,
        model_type="roberta",
    )
    model.create_htsat_model = build_htsat
    RobertaModel.from_pretrained = classmethod(
        lambda cls, *args, **kwargs: RobertaModel(RobertaConfig(**TEXT))
    )
    clap = model.CLAP(AUDIO["hidden_size"], audio, text, joint_embed_shape=EMBED_DIM)
    # The class writes the width of RoBERTa-base as a number.
    clap.text_projection[0] = torch.nn.Linear(TEXT["hidden_size"], EMBED_DIM)
    return clap


def write(folder: Path) -> None:
    """Writes the checkpoint and the outputs."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = build_laion_clap()
    fixed = ("audio_branch.spectrogram", "audio_branch.logmel")
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and not name.startswith(fixed):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.logit_scale_a.data.fill_(3.0)
    norm = model.audio_branch.bn0
    norm.running_mean.copy_(torch.randn(NUM_MEL_BINS, generator=generator) * 5 - 20)
    norm.running_var.copy_(torch.rand(NUM_MEL_BINS, generator=generator) * 30 + 10)
    model.eval()
    samples = NUM_FRAMES * HOP_SAMPLES - HOP_SAMPLES
    waveforms = torch.randn(3, samples, generator=generator) * 0.1
    ids = torch.randint(4, TEXT["vocab_size"], (3, NUM_TOKENS), generator=generator)
    ids[0, 6:] = ids[1, 8:] = 1
    branch = model.audio_branch
    mask = (ids != 1).long()
    audio = branch({"waveform": waveforms}, mixup_lambda=None, device="cpu")["embedding"]
    outputs = {
        "mel": branch.logmel_extractor(branch.spectrogram_extractor(waveforms)),
        "ids": ids,
        "audio": normalize(model.audio_projection(audio), dim=-1),
        "text": normalize(
            model.encode_text({"input_ids": ids, "attention_mask": mask}, device="cpu"), dim=-1
        ),
    }
    for kind in ("audio", "text"):
        direction = torch.randn(outputs[kind].shape, generator=generator)
        outputs[f"{kind}_direction"] = direction
        (outputs[kind] * direction).sum().backward()
    parameters = dict(model.named_parameters())
    outputs |= {f"gradient.{name}": parameters[name].grad for name in GRADIENTS}
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in outputs.items()},
        folder / "outputs.safetensors",
    )
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    # Older versions of transformers, with which LAION trained, saved this buffer.
    positions = torch.arange(TEXT["max_position_embeddings"])[None]
    state["module.text_branch.embeddings.position_ids"] = positions
    # A number of numpy and protocol 4, for which torch.load(weights_only=True) refuses LAION's.
    content = {"epoch": np.float64(7), "name": "tiny", "state_dict": state, "scaler": {}}
    torch.save(content, folder / CHECKPOINT.name, pickle_protocol=4)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
