"""The other half of exchange_check.py: runs in a peer package's own environment, with that package alone.

Writes the package's own files of every architecture with what it makes of some rows, or reads ours and says what it
makes of theirs. Knows nothing of Sememe.

    python exchange_worker.py PACKAGE write|read FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

D, D_OUT, N, K, ROWS = 24, 16, 96, 6, 64
PROBE, ANSWER = "probe.npz", "answer.npz"


def rows() -> Tensor:
    return 0.7 + 1.5 * torch.randn(ROWS, D, generator=torch.Generator().manual_seed(99))


def randomise(module: torch.nn.Module, seed: int = 0) -> Any:
    """Random weights in every part, so that nothing is left out by being zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = (
                0.3 if name in ("r_mag",) or name.endswith("bias") or name.startswith("b_") else 1 / D**0.5
            )
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "threshold" in name:
                parameter.abs_()
    return module.eval()


def save(folder: Path, x: Tensor, acts: Tensor, recon: Tensor) -> None:
    np.savez(folder / PROBE, x=x.numpy(), acts=acts.detach().numpy(), recon=recon.detach().numpy())


# -- SAELens -----------------------------------------------------------------------------------------


def sae_lens_cases() -> Iterator[tuple[str, Callable[[Path], tuple[Tensor, Tensor]]]]:
    import sae_lens as sl

    x = rows()

    def plain(name: str, cls: Any, config: Any, spread: Tensor | None = None) -> Any:
        def write(folder: Path) -> tuple[Tensor, Tensor]:
            sae = randomise(cls(config))
            sae.save_model(folder)
            recon = sae(x)
            acts = sae.encode(x)
            return (acts if spread is None else acts * spread), recon

        return name, write

    size: dict[str, Any] = {"d_in": D, "d_sae": N}
    for centred in (True, False):
        more = size | {"apply_b_dec_to_input": centred}
        tail = "" if centred else "-uncentred"
        yield plain(f"standard{tail}", sl.StandardSAE, sl.StandardSAEConfig(**more))
        yield plain(f"gated{tail}", sl.GatedSAE, sl.GatedSAEConfig(**more))
        yield plain(f"jumprelu{tail}", sl.JumpReLUSAE, sl.JumpReLUSAEConfig(**more))
        yield plain(f"topk{tail}", sl.TopKSAE, sl.TopKSAEConfig(k=K, **more))
    yield plain("topk-rescaled", sl.TopKSAE, sl.TopKSAEConfig(k=K, rescale_acts_by_decoder_norm=True, **size))
    std = x.std(dim=1, keepdim=True)
    length = x.norm(dim=1, keepdim=True) / D**0.5
    yield plain(
        "layer_norm", sl.TopKSAE, sl.TopKSAEConfig(k=K, normalize_activations="layer_norm", **size), std
    )
    rescaled = sl.StandardSAEConfig(normalize_activations="constant_norm_rescale", **size)
    yield plain("constant_norm_rescale", sl.StandardSAE, rescaled, length)
    wide = size | {"d_out": D_OUT, "apply_b_dec_to_input": False}
    yield plain("transcoder", sl.Transcoder, sl.TranscoderConfig(**wide))
    yield plain("skip_transcoder", sl.SkipTranscoder, sl.SkipTranscoderConfig(**wide))
    yield plain("jumprelu_transcoder", sl.JumpReLUTranscoder, sl.JumpReLUTranscoderConfig(**wide))
    yield plain(
        "jumprelu_skip_transcoder", sl.JumpReLUSkipTranscoder, sl.JumpReLUSkipTranscoderConfig(**wide)
    )

    def scaled(folder: Path) -> tuple[Tensor, Tensor]:
        factor = 0.37
        sae = randomise(sl.StandardSAE(sl.StandardSAEConfig(**size)))
        sae.cfg.normalize_activations = "expected_average_only_in"
        sae.save_model(folder)
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        acts = sae.encode(x * factor)
        return acts, sae.decode(acts) / factor

    yield "expected_average_only_in", scaled

    def trained(cls: Any, config: Any, inference: bool) -> Callable[[Path], tuple[Tensor, Tensor]]:
        def write(folder: Path) -> tuple[Tensor, Tensor]:
            sae = randomise(cls(config))
            sae.topk_threshold.fill_(0.8)
            sae.save_inference_model(folder)
            reference = sl.SAE.load_from_disk(folder)
            if not inference:
                sae.save_model(folder)
            return reference.encode(x), reference(x)

        return write

    batch = sl.BatchTopKTrainingSAEConfig(k=K, **size)
    nested = sl.MatryoshkaBatchTopKTrainingSAEConfig(k=K, matryoshka_widths=[16, 48, N], **size)
    for name, cls, config in (
        ("batchtopk", sl.BatchTopKTrainingSAE, batch),
        ("matryoshka_batchtopk", sl.MatryoshkaBatchTopKTrainingSAE, nested),
    ):
        yield f"{name}-inference", trained(cls, config, True)
        yield f"{name}-checkpoint", trained(cls, config, False)


def sae_lens_read(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    import sae_lens as sl

    sae = sl.SAE.load_from_disk(folder)
    return sae.encode(x), sae(x)


# -- dictionary_learning -----------------------------------------------------------------------------


def dictionary_classes() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    from dictionary_learning import dictionary as d
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "AutoEncoder": (d.AutoEncoder, ()),
        "AutoEncoderNew": (d.AutoEncoderNew, ()),
        "AutoEncoderTopK": (AutoEncoderTopK, (K,)),
        "BatchTopKSAE": (BatchTopKSAE, (K,)),
        "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKSAE, (K, [16, 32, 48])),
        "GatedAutoEncoder": (d.GatedAutoEncoder, ()),
        "JumpReluAutoEncoder": (d.JumpReluAutoEncoder, ()),
    }
    if hasattr(d, "CrossCoder"):
        found["CrossCoder"] = (d.CrossCoder, (2,))
    return found


def dictionary_learning_cases() -> Iterator[tuple[str, Callable[[Path], tuple[Tensor, Tensor]]]]:
    x = rows()

    def case(name: str, cls: Any, more: tuple[Any, ...]) -> Callable[[Path], tuple[Tensor, Tensor]]:
        def write(folder: Path) -> tuple[Tensor, Tensor]:
            layers = 2 if name == "CrossCoder" else 1
            made = randomise(cls(D // layers, N, *more))
            if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
                made.threshold.fill_(0.8)
            torch.save(made.state_dict(), folder / "ae.pt")
            trainer = {"dict_class": name, "activation_dim": D // layers, "dict_size": N}
            if more and name != "CrossCoder":
                trainer["k"] = K
            (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
            inputs = x.view(ROWS, layers, -1) if layers > 1 else x
            acts = made.encode(inputs)
            return acts, made.decode(acts).reshape(ROWS, -1)

        return write

    for name, (cls, more) in dictionary_classes().items():
        yield name, case(name, cls, more)


def dictionary_learning_read(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    cls = dictionary_classes()[trainer["dict_class"]][0]
    # an AutoEncoder is loaded as it is saved: its decoder is not scaled to norm 1, which is the package's default
    more = {"normalize_decoder": False} if trainer["dict_class"] == "AutoEncoder" else {}
    made = cls.from_pretrained(folder / "ae.pt", **more).eval()
    acts = made.encode(x)
    return acts, made.decode(acts)


# -- sparsify ----------------------------------------------------------------------------------------


def _sparse(coder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    found = coder.encode(x)
    acts = torch.zeros(len(x), coder.num_latents).scatter(1, found.top_indices, found.top_acts)
    recon = coder.decode(found.top_acts, found.top_indices)
    if coder.W_skip is not None:
        recon = recon + x @ coder.W_skip.mT  # as its forward does
    return acts, recon


def sparsify_cases() -> Iterator[tuple[str, Callable[[Path], tuple[Tensor, Tensor]]]]:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    x = rows()

    def case(**options: Any) -> Callable[[Path], tuple[Tensor, Tensor]]:
        def write(folder: Path) -> tuple[Tensor, Tensor]:
            coder = randomise(SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, **options)))
            coder.save_to_disk(folder)
            return _sparse(coder, x)

        return write

    for activation in ("topk", "groupmax"):
        for transcode in (False, True):
            for skip in (False, True):
                name = f"{activation}{'-transcode' if transcode else ''}{'-skip' if skip else ''}"
                yield name, case(activation=activation, transcode=transcode, skip_connection=skip)


def sparsify_read(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from sparsify import SparseCoder

    return _sparse(SparseCoder.load_from_disk(folder), x)


CASES = {
    "sae_lens": sae_lens_cases,
    "dictionary_learning": dictionary_learning_cases,
    "sparsify": sparsify_cases,
}
READ = {"sae_lens": sae_lens_read, "dictionary_learning": dictionary_learning_read, "sparsify": sparsify_read}


@torch.no_grad()
def main() -> None:
    package, direction, where = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if direction == "write":
        for name, write in CASES[package]():
            folder = where / name
            folder.mkdir(parents=True)
            acts, recon = write(folder)
            save(folder, rows(), acts, recon)
        return
    for folder in sorted(path.parent for path in where.glob(f"*/{PROBE}")):
        x = torch.from_numpy(np.load(folder / PROBE)["x"])
        acts, recon = READ[package](folder, x)
        np.savez(folder / ANSWER, acts=acts.detach().numpy(), recon=recon.detach().numpy())


if __name__ == "__main__":
    main()
