"""Pref-Restore: discrete semantics from a language model steer a flow that restores a face; preferences then refine it.

Paper: "Bridging Information Asymmetry: A Hierarchical Framework for Blind Face Restoration with Reduced Uncertainty", arXiv
2601.19506 v3; stage 2 is DiffusionNFT (negative-aware fine-tuning). The degraded face is read twice. TA-Tok turns it into
visual tokens. Qwen3 reads these, and a caption if there is one, and generates the visual tokens of the clean face; its hidden
states, through a connector, are the semantic tokens. The encoder of the autoencoder, tuned on degraded faces, gives the
texture tokens. Both enter the cross-attention of SANA, a flow on latents. Training is staged, because parts that are trained
at once disturb each other. Stage 1.1 aligns meaning, stage 1.2 texture. Stage 2 draws groups of restorations, rewards looks
*and* likeness, and moves the velocity field towards restorations above their group's mean reward.

    paper         name here    shape              range       meaning
    x_LQ, x_HQ    lq, hq       (B, 3, S, S)       [-1, 1]     degraded and clean face
    T             captions     B strings                      what the faces show, may be empty
    s_1..s_729    tokens       (B, N)             0..65535    TA-Tok's visual tokens, N = 27 x 27
    S             states       (B, N + 1, H)                  Qwen3's last hidden states at <S0>, s_1 .. s_N (DIFFERS: S of
                                                              Eq. 7-8 is the tokens)
    Z_LQ          z_lq         (B, c, h, w)                   scaled latent of the trained encoder E_psi
    z_0           x0, z_hq     (B, c, h, w)       sigma = 0   scaled latent of the frozen encoder E_0
    z_t           x, x_t       (B, c, h, w)                   (1 - sigma) x0 + sigma eps; t of the paper is sigma here
    v_theta       v            (B, c, h, w)                   velocity eps - x0, from sigma = 1 (noise) to 0 (face)
    v_ref         v_old        (B, c, h, w)                   the lagged policy that draws the roll-outs (DIFFERS: in print
                                                              stage 1's velocity, v_stage1 here)
    C             cond         (B, N + 1 + h w, D)            semantic tokens, then texture tokens
    r             r            (B,)               [0, 1]      optimality probability of a roll-out

    [Eq. 1-3] say what minimises Eq. 4: tested   [Eq. 4] nft_loss   [Eq. 5-6] the Bayesian reading, nothing to compute
    [Eq. 7] SemanticIntegrator.generate, token_loss   [Eq. 8] euler_sample, dpm_solver_sample
    [Eq. 9] semantic_loss   [Eq. 10] texture_loss, latent_consistency_loss   [Eq. 11] total_reward   [Eq. 12] optimality
    [Eq. 13-14] implicit_velocities   [Eq. 15] nft_loss
    [Eq. 16] common.degrade, preset pref_restore: blur of sigma 1-15, down 1-30, noise 0-20, JPEG 30-90

Read first: `PrefRestore`, `build_sequence`, `semantic_loss`, `texture_loss`, then the loops `train_alignment` (stage 1) and
`train_preference`, then `read_face` and `draw_face`. Qwen3, SANA, DC-AE and SigLIP come from transformers and diffusers.
Run `python pref_restore.py train` (toy faces, CPU) or `train --preset paper --data FFHQ`, a folder with captions.json.
Left out: the making of captions (Qwen2.5-VL); the pre-training of BLIP3o-NEXT, toy/sana.py trains a small stand-in; GRPO's
loop, whose loss and sampler are here. UNSTATED: the paper is silent, and what follows is the source. DIFFERS: we depart from
the paper, or where it says so from the authors' code.
"""
import copy
import dataclasses
import functools
import json
import math
import re
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# common comes first: it sets up OpenMP before torch is imported
from common import (ATTRIBUTES, DEGRADATIONS, EMA, SIBLINGS, TOY, Run, SampleFlags, TrainFlags, UserError, command_line,
                    from_folder, load_strict, lr_schedule, make_optimizer, mix, open_faces, open_run, read_json, read_weights,
                    restore_folder, save_part)

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import metrics

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train stages 1.1, 1.2 and 2 on a pretrained generator, then restore held-out faces."""
    # The values are the paper's [Table I] where no comment says otherwise; TOY_VALUES below are the toy's.
    output: str = "runs/pref_restore"      # folder for weights, checkpoints, log and pictures
    stage: typing.Literal["all", "1", "1.1", "1.2", "joint", "2"] = "all"  # one stage, 1 (1.1 and 1.2), or all in order
    degradation: typing.Literal[tuple(DEGRADATIONS)] = "pref_restore"  # Eq. 16; the ranges are the authors' code's
    batch_size: int = 8                    # faces per process at a time (stage 2: times --groups roll-outs); paper 128 on 8
    gradient_accumulation_steps: int = 2   # micro-batches per step of stages 1.1 and 1.2
    gradient_checkpointing: bool = True    # recompute layers in the backward pass: less memory, more time
    lr_scheduler: typing.Literal["cosine", "constant"] = "cosine"  # of stages 1.1 and 1.2; stage 2 is constant
    lr_warmup_steps: int = 500             # of stage 1; paper 0.01 of the steps
    ema_decay: float = 0.0                 # of stage 1's averaged weights (0: none, UNSTATED: authors); stage 2 averages by 0.9
    pretrained: str = "BLIP3o/BLIP3o-NEXT-SFT-3B"  # run of ours, the authors' layout, or Qwen3 (DIFFERS: 1.7B; paper 0.6B)
    sana: str = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"  # diffusers folder with transformer/ and vae/
    ta_tok: str = ""                       # ta_tok.pth, in place of the TA-Tok of --pretrained
    semantic: bool = True                  # Table VII: --no-semantic (with --texture_steps 100000): texture tokens alone
    as_printed: bool = False               # not the authors' code: SANA's caption layers frozen, no loss on text, Eq. 13-15
    semantic_steps: int = 50_000           # stage 1.1 [sec. V-F, Table IX]; UNSTATED for Table II
    semantic_learning_rate: float = 1e-4   # stage 1.1, peak
    texture_steps: int = 50_000            # stage 1.2; joint training has both: 100 000 [sec. V-F]
    texture_learning_rate: float = 2e-5    # stage 1.2, peak; UNSTATED for joint
    diffusion_weight: float = 1.0          # lambda of Eq. 9, stage 1.2 and joint. UNSTATED: authors' code
    caption_share: float = 0.9             # share of prompts with the caption. UNSTATED: authors' code
    identity_share: float = 0.2            # share whose input is the clean face. UNSTATED: authors' code, a side task
    condition_dropout: float = 0.1         # share with the null condition, for guidance. UNSTATED: authors' code
    own_answers: float = 0.0               # stage 1.2: share of answers that the model generates itself; authors 0
    preference_steps: int = 300            # epochs of stage 2. UNSTATED: the authors' code runs until it is stopped
    learning_rate: float = 3e-4            # of stage 2, constant
    rank: int = 32                         # of the LoRA, whose alpha is twice that. UNSTATED: authors' code
    groups: int = 6                        # degraded faces per process and epoch; authors 48 over 8 GPUs, Table I batch 72
    group_size: int = 24                   # K roll-outs of each. UNSTATED: authors' code
    rollout_steps: int = 30                # solver steps of a roll-out. UNSTATED: authors' code
    timestep_fraction: float = 0.99        # share of the noise levels trained on. UNSTATED: authors' code, 29 of 30
    nft_beta: float = 0.1                  # beta of Eq. 13-14. UNSTATED: authors' code
    adv_clip: float = 5.0                  # Z of Eq. 12 in standard deviations. UNSTATED: authors' code
    kl_weight: float = 1e-4                # distance to stage 1's velocity. UNSTATED: authors' code
    rewards: str = ""                      # folder of the reward networks, see REWARD_FILES (default: toy face readers)
    hps_weight: float = 1.0                # HPSv2.1 (paper HPSv2): looks, given the caption. UNSTATED: authors' code, as all six
    clip_weight: float = 1.0               # CLIPScore, agreement with the caption
    pick_weight: float = 1.0               # PickScore, looks given the caption
    identity_weight: float = 0.5           # ArcFace cosine
    lpips_weight: float = 0.5              # minus LPIPS
    lmd_weight: float = 0.5                # 1 / (1 + landmark distance / 20)
    num_inference_steps: int = 30          # solver steps. UNSTATED: authors' code, as the next two
    solver: typing.Literal["euler", "dpm"] = "euler"  # dpm: DPM-Solver++(2M), as in roll-outs
    guidance_scale: float = 2.0            # 1 is no guidance
    ar: typing.Literal["sample", "greedy"] = "sample"  # tokens are drawn [sec. IV-B1], or the likeliest


# The fields that decide what weights mean: `Run` refuses to go on with a run that has others.
SETTINGS = ("pretrained", "sana", "ta_tok", "semantic", "rank")
TOY_VALUES = dict(
    TOY, batch_size=8, gradient_accumulation_steps=1, gradient_checkpointing=False, lr_warmup_steps=5,
    ema_decay=0.995, pretrained="toy/weights/sana", sana="toy/weights/sana", semantic_steps=600, semantic_learning_rate=5e-3,
    texture_steps=2000, texture_learning_rate=1e-2, own_answers=1.0, preference_steps=120, learning_rate=4e-3, rank=16, groups=8,
    group_size=12, rollout_steps=10, timestep_fraction=0.3, adv_clip=1.5, kl_weight=0.005, num_inference_steps=10,
    solver="dpm", guidance_scale=1.25,
    # Looks weigh little: four times as heavy they raised contrast and cost a decibel
    hps_weight=0.15, clip_weight=0.08, pick_weight=0.1, identity_weight=0.6, lpips_weight=0.45, lmd_weight=2.0)


@dataclass(frozen=True)
class Sample(SampleFlags):
    """Restore faces with trained weights, with a caption or without."""
    output: str = "results/pref_restore"   # folder for restored_faces/, cmp/ and args.json
    checkpoint: str = "toy/weights/pref_restore"  # output folder of a training run, or the authors' folder or hub id
    caption: str = ""                      # caption of all faces that --captions does not name
    captions: str = ""                     # JSON: {"file name": caption}
    sana: str = ""                         # for the authors' checkpoint: diffusers folder with configs and the VAE
    ta_tok: str = ""                       # ta_tok.pth, in place of the checkpoint's TA-Tok
    lora: str = ""                         # folder of a preference LoRA in peft's layout
    policy: typing.Literal["current", "base"] = "current"  # after stage 2, or the stage 1 below it
    num_inference_steps: int = 0           # solver steps (0: as trained)
    solver: typing.Literal["", "euler", "dpm"] = ""  # (default: as trained)
    guidance_scale: float = 0.0            # 1 is no guidance (0: as trained)
    ar: typing.Literal["", "sample", "greedy"] = ""  # how visual tokens are chosen (default: as trained)


# Sizes of the released networks, where a checkpoint's config.json says none. The toy's are in toy/sana.py.
QWEN3 = dict(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=217_210,
             tie_word_embeddings=True, max_position_embeddings=40_960, rms_norm_eps=1e-6,
             rope_parameters={"rope_type": "default", "rope_theta": 1e6})
QWEN3_06B = dict(QWEN3, hidden_size=1024, intermediate_size=3072)
QWEN3_17B = dict(QWEN3, hidden_size=2048, intermediate_size=6144)
SANA15 = dict(in_channels=32, out_channels=32, num_attention_heads=70, attention_head_dim=32, num_layers=20,
              num_cross_attention_heads=20, cross_attention_head_dim=112, cross_attention_dim=2240,
              caption_channels=2304, mlp_ratio=2.5, sample_size=32, patch_size=1, qk_norm="rms_norm_across_heads")
BLOCKS, SCALES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, ((),) * 3 + ((5,),) * 3
WIDTHS = (128, 256, 512, 512, 1024, 1024)
DCAE = dict(latent_channels=32, attention_head_dim=32, encoder_block_types=BLOCKS, decoder_block_types=BLOCKS,
            encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS,
            encoder_layers_per_block=(2, 2, 2, 3, 3, 3), decoder_layers_per_block=(3,) * 6,
            encoder_qkv_multiscales=SCALES, decoder_qkv_multiscales=SCALES,
            upsample_block_type="interpolate", downsample_block_type="conv", scaling_factor=0.41407)
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
              patch_size=14, vision_use_head=False, hidden_act="gelu_pytorch_tanh")
HPS_CLIP = dict(  # open_clip's ViT-H/14
    projection_dim=1024,
    vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                       image_size=224, patch_size=14, hidden_act="gelu", projection_dim=1024),
    text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     hidden_act="gelu", projection_dim=1024))

# ------------------------------------------------------------------------------------------------ model: sequences

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER = "<|im_start|>user\n"
END = "<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"
ASK = "\nPlease reconstruct the given image."
ASK_CAPTION = "\nPlease reconstruct the given image based on the image content:"
COPY = ("\nThis is a side mission. Please complete the auxiliary reconstruction task by duplicating "
        "the given high-definition image.")
# Text to image, for pre-training. DIFFERS: "Please generate image based on the following caption: ..." in the authors' code.
DRAW = "Please generate an image:"


class Vocabulary:
    """A text tokenizer and, behind its `first` tokens, <im_start> <im_end> <S0> <S1> <S2> and the visual tokens <I0> ..

    The order of adding fixes the ids: with Qwen3's 151 669 tokens the first visual one is 151 674, the size 217 210.
    <im_start> marks an image and is not the chat's <|im_start|>.
    """

    def __init__(self, tokenizer, codes: int, first: int | None = None):
        first = len(tokenizer) if first is None else first
        self.tokenizer, self.codes, self.pad = tokenizer, codes, tokenizer.pad_token_id or 0
        self.image_start, self.image_end, self.scale, self.first_code = first, first + 1, first + 2, first + 5
        self.size = self.first_code + codes

    def encode(self, text: str) -> list:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []


class Sequence(NamedTuple):
    ids: torch.Tensor      # (B, L) tokens
    mask: torch.Tensor     # (B, L) bool, False on padding
    labels: torch.Tensor   # (B, L) ids, -100 where no loss is wanted
    start: torch.Tensor    # (B,) place of <S0>: the answer's states are start .. start + N


def prompt_pieces(vocab, source, caption: str, task: str, room: int) -> tuple:
    """(tokens before the image, tokens after it) of the user's turn; a caption longer than `room` tokens is cut."""
    text = vocab.encode(" " + caption.strip())[:room] if caption.strip() else []
    if source is None:                                             # text to image
        return vocab.encode(SYSTEM + USER + DRAW) + text, vocab.encode(END + ASSISTANT)
    ask = COPY if task == "copy" else ASK_CAPTION if text else ASK
    text = [] if task == "copy" else text                          # the side task needs no caption
    return vocab.encode(SYSTEM + USER), vocab.encode(ask) + text + vocab.encode(END + ASSISTANT)


def caption_room(vocab, count: int, context: int) -> int:
    """Tokens that a caption may have beside two images of `count` tokens."""
    fixed = len(vocab.encode(SYSTEM + USER + ASK_CAPTION + END + ASSISTANT + END)) + 3 + 2 * count
    return max(0, context - fixed)


def build_sequence(vocab, source, captions, answer=None, tasks=None, context=2048, count=None, ce_on_text=True):
    """The chat layout as a `Sequence`. source: visual tokens (B, N), or a list of B rows, None for text to image.

        system | user: [N tokens of the degraded face] request (caption) | assistant: <im_start> <S0> [N tokens] <im_end> end

    With an answer (B, N) the rows are padded on the right, for training. Without, they end after <S0> and are padded on
    the LEFT, so that all rows of a batch continue at the same place. Labels are -100 on padding and the degraded face; with
    ce_on_text False on all text too, which the authors' code learns (its masking line is commented out).
    """
    device = answer.device if answer is not None else next((s.device for s in source if s is not None), "cpu")
    source, answer = (rows.cpu() if torch.is_tensor(rows) else rows for rows in (source, answer))
    count = count or (len(answer[0]) if answer is not None else len(source[0]))
    room = caption_room(vocab, count, context)
    rows, labels, starts = [], [], []
    for b, caption in enumerate(captions):
        before, after = prompt_pieces(vocab, source[b], caption, tasks[b] if tasks is not None else "restore", room)
        image = [] if source[b] is None else (source[b] + vocab.first_code).tolist()
        row = before + image + after + [vocab.image_start, vocab.scale]
        label = before + [-100] * len(image) + after + [vocab.image_start, vocab.scale]
        label = label if ce_on_text else [-100] * len(label)
        starts.append(len(row) - 1)
        if answer is not None:
            tokens, closing = (answer[b] + vocab.first_code).tolist() + [vocab.image_end], vocab.encode(END)
            row, label = row + tokens + closing, label + tokens + (closing if ce_on_text else [-100] * len(closing))
        rows.append(row)
        labels.append(label)

    side = "left" if answer is None else "right"
    pad = lambda rows, value: nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True,
                                                        padding_value=value, padding_side=side).to(device)
    ids, mask, targets = pad(rows, vocab.pad), pad([[True] * len(row) for row in rows], False), pad(labels, -100)
    starts = starts if answer is not None else [ids.shape[1] - 1] * len(rows)                # the left padding moved <S0>
    return Sequence(ids, mask, targets, torch.tensor(starts, device=device))


# ------------------------------------------------------------------------------------------------ model: TA-Tok


class SimVQ(nn.Module):
    """Vector quantiser whose codebook is a linear map of a frozen random table: no code can die alone [SimVQ].

    (B, N, d) -> straight-through codes of that shape, ids (B, N), loss. l2_normalized: nearest by cosine, else Euclid.
    """

    def __init__(self, codes: int, dim: int, l2_normalized: bool = True, commitment: float = 0.25):
        super().__init__()
        self.l2_normalized, self.commitment = l2_normalized, commitment
        self.embedding = nn.Embedding(codes, dim)
        nn.init.normal_(self.embedding.weight, std=dim ** -0.5)
        self.embedding.weight.requires_grad_(False)
        self.embedding_proj = nn.Linear(dim, dim)

    def codebook(self):
        table = self.embedding_proj(self.embedding.weight)
        return F.normalize(table, dim=-1) if self.l2_normalized else table

    def forward(self, z):
        z, table = F.normalize(z, dim=-1) if self.l2_normalized else z, self.codebook()
        if self.l2_normalized:
            ids = (z @ table.T).argmax(-1)
        else:                                                     # |z|^2 does not change which is nearest
            ids = (table.square().sum(-1) - 2 * z @ table.T).argmin(-1)
        code = table[ids]
        loss = (code - z.detach()).square().mean() + self.commitment * (code.detach() - z).square().mean()
        return z + (code - z).detach(), ids, loss


class TATok(nn.Module):
    """Text-aligned tokenizer: SigLIP2 features before the last layer, a bottleneck, SimVQ. Always frozen here.

    encode: (B, 3, S, S) in [-1, 1] -> ids (B, N). Parameter names are TA-Tok's. The SigLIP processor's [-1, 1] is this
    project's own range, so nothing is normalised twice.
    """

    def __init__(self, siglip: dict, codes: int, code_dim: int, l2_normalized: bool = True):
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel
        self.size, width = siglip["image_size"], siglip["hidden_size"]
        self.encoder = SiglipVisionModel(SiglipVisionConfig(**siglip))
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.bottleneck = nn.ModuleDict(dict(in_linear=nn.Linear(width, code_dim),
                                             regularizer=SimVQ(codes, code_dim, l2_normalized),
                                             out_linear=nn.Linear(code_dim, width)))
        self.count = (siglip["image_size"] // siglip["patch_size"]) ** 2

    def features(self, images):
        """(B, 3, S, S) -> (B, N, d) before the quantiser. DIFFERS: SigLIP's processor resizes 8-bit pictures; pixels
        are at most one level of 255 apart."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        x = self.encoder(images, output_hidden_states=True).hidden_states[-2]                # (B, N, width), no post-LN
        return self.bottleneck["in_linear"](self.encode_task_layer(x))

    def forward(self, images):
        """-> quantised features (B, N, width), ids (B, N), quantiser's loss."""
        code, ids, loss = self.bottleneck["regularizer"](self.features(images))
        return self.bottleneck["out_linear"](code), ids, loss

    @torch.no_grad()
    def encode(self, images):
        with torch.autocast(images.device.type, enabled=False):    # the same tokens in every precision
            return self(images.float())[1]


# ------------------------------------------------------------------------------------------------ model: integrator


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32, whatever the autocast."""

    def forward(self, x):
        return super().forward(x.float())


def connector(width: int, out: int) -> nn.Sequential:
    """Linear, GELU(tanh), Linear, RMSNorm of weight sqrt(5.5): (.., width) -> (.., out), as BLIP3o-NEXT."""
    layers = nn.Sequential(nn.Linear(width, out), nn.GELU("tanh"), nn.Linear(out, out), RMSNorm(out, eps=1e-5))
    nn.init.constant_(layers[3].weight, math.sqrt(5.5))
    return layers


def pick_token(logits, top_k: int = 0, top_p: float = 1.0, temperature: float = 0.0, generator=None):
    """(B, V) logits -> (B,) ids: the greatest at temperature 0, else a draw among the top_k and the top_p mass."""
    if not temperature:
        return logits.argmax(-1)
    values, order = (logits.float() / temperature).sort(-1, descending=True)
    if top_k:
        values[:, top_k:] = -math.inf                              # before top_p, which is a share of what is left
    shares = values.softmax(-1)
    out = shares.cumsum(-1) - shares >= top_p                      # mass before a token
    out[:, 0] = False
    shares = shares.masked_fill(out, 0)
    draw = torch.multinomial(shares.cpu(), 1, generator=generator).to(order.device)
    return order.gather(1, draw)[:, 0]


class SemanticIntegrator(nn.Module):
    """Qwen3 over text and visual tokens; its last hidden states at the answer become SANA's condition.

    [Eq. 7] p(S | x_LQ, T) = prod_i p(s_i | s_<i, F_v, F_t). DIFFERS: the paper calls F_v a continuous projection of
    SigLIP2. The authors' code, as here, looks the *discrete* tokens of the degraded face up in the embedding table.
    """

    def __init__(self, config: dict, out: int):
        super().__init__()
        from transformers import Qwen3Config, Qwen3Model
        self.llm = Qwen3Model(Qwen3Config(**config))
        if not config["tie_word_embeddings"]:
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.connector = connector(config["hidden_size"], out)

    @property
    def head(self):
        """(V, H) output weights: the embedding itself where it is tied."""
        return self.lm_head.weight if hasattr(self, "lm_head") else self.llm.embed_tokens.weight

    def forward(self, sequence: Sequence):
        """-> (B, L, H), after the last RMSNorm. Positions count from the first real token of a row."""
        place = (sequence.mask.cumsum(1) - 1).clamp(min=0)
        return self.llm(input_ids=sequence.ids, attention_mask=sequence.mask.long(), position_ids=place,
                        use_cache=False).last_hidden_state

    @torch.no_grad()
    def generate(self, sequence: Sequence, vocab, count: int, **choice):
        """Exactly `count` visual tokens after the prompts, and the N + 1 states at <S0> and at each token.

        choice: options of `pick_token`, whose defaults are greedy. Logits are taken over the visual tokens alone, so
        nothing can end early. DIFFERS: the authors generate freely and then run the whole sequence once more; the
        states of the cached pass are the same.
        """
        from transformers import DynamicCache
        cache, ids, mask, states, tokens = DynamicCache(), sequence.ids, sequence.mask.long(), [], []
        place = (mask.cumsum(1) - 1).clamp(min=0)
        visual = self.head[vocab.first_code:vocab.first_code + vocab.codes]
        for i in range(count + 1):
            hidden = self.llm(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True,
                              cache=cache).last_hidden_state[:, -1]
            states.append(hidden)
            if i < count:
                tokens.append(pick_token(F.linear(hidden, visual.to(hidden.dtype)), **choice))
                ids, place = tokens[-1][:, None] + vocab.first_code, place[:, -1:] + 1
                mask = F.pad(mask, (0, 1), value=1)
        return torch.stack(tokens, 1), torch.stack(states, 1)


def answer_states(states, start, count: int):
    """(B, L, H) -> (B, N + 1, H): the states at <S0> and the N visual tokens, from `start` on.

    DIFFERS: the authors' guard compares the wrong dimension, so training takes the last 730 places of the padded batch
    (shifted by three, and padding for shorter rows) while inference takes these.
    """
    place = start[:, None] + torch.arange(count + 1, device=start.device)
    return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))


# ------------------------------------------------------------------------------------------------ model: the whole


class PrefRestore(nn.Module):
    """All networks: TA-Tok, Qwen3 with its connector, SANA, the autoencoder, its encoder for degraded faces."""

    def __init__(self, sizes: dict):
        super().__init__()
        from diffusers import AutoencoderDC, SanaTransformer2DModel
        self.sana, self.vae = SanaTransformer2DModel(**sizes["sana"]), AutoencoderDC(**sizes["vae"])
        self.tatok = TATok(**sizes["tatok"])
        out = sizes["sana"]["caption_channels"]
        self.integrator = SemanticIntegrator(sizes["llm"], out)
        inner = sizes["sana"]["num_attention_heads"] * sizes["sana"]["attention_head_dim"]
        # DIFFERS: a norm of its own; in the authors' vae_connector it is by accident that of the semantic connector.
        self.texture = connector(inner, out)
        self.lq_encoder = copy.deepcopy(self.vae.encoder)                                # E_psi; vae.encoder is E_0
        self.register_buffer("latent_scale", torch.tensor(float(sizes["vae"].get("scaling_factor", 1.0))))

    @torch.no_grad()
    def encode(self, hq):
        """x0 = scale E_0(x_HQ): (B, 3, S, S) -> (B, c, h, w)."""
        return self.vae.encoder(hq) * self.latent_scale

    def encode_lq(self, lq):
        """scale E_psi(x_LQ)."""
        return self.lq_encoder(lq) * self.latent_scale

    def decode(self, z):
        """(B, c, h, w) -> (B, 3, S, S), clipped."""
        return self.vae.decoder(z / self.latent_scale).float().clamp(-1, 1)

    def condition(self, states=None, z_lq=None):
        """C = [semantic tokens ; texture tokens] along the sequence, of what is given; texture passes SANA's frozen patch
        embedding. Inside SANA caption_projection and caption_norm act on C before the cross-attention."""
        semantic = [] if states is None else [self.integrator.connector(states)]
        texture = [] if z_lq is None else [self.texture(self.sana.patch_embed(z_lq))]
        return torch.cat(semantic + texture, 1)

    def velocity(self, x, sigma, cond):
        """(B, c, h, w), (B,), (B, L, D) -> (B, c, h, w). SANA's clock runs to 1000."""
        return self.sana(x, encoder_hidden_states=cond, timestep=1000 * sigma, return_dict=False)[0].float()


# PARTS: names of the parameters that a stage trains and its file holds; all else is frozen. BEFORE: stages it stands on.
SEMANTIC, TEXTURE = r"integrator\.|sana\.caption_", r"sana\.transformer_blocks\.|texture\.|lq_encoder\."
PARTS = {"1.1": SEMANTIC, "1.2": TEXTURE, "joint": f"{SEMANTIC}|{TEXTURE}", "2": r"sana\..*\.lora_[AB]$"}
BEFORE = {"1.1": (), "1.2": ("1.1",), "joint": (), "2": ("1.1", "1.2", "joint")}


def route(model, stage: str, cfg) -> list:
    """Freeze all but what the stage trains; returns those parameters."""
    for name, parameter in model.named_parameters():
        # DIFFERS: the paper freezes SANA in stage 1.1; the authors' code trains its caption_projection and caption_norm
        frozen = stage == "1.1" and cfg.as_printed and name.startswith("sana.caption_")
        parameter.requires_grad_(bool(re.match(PARTS[stage], name)) and not frozen)
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------ model: policies


class PolicyLinear(nn.Module):
    """One frozen linear layer and two low-rank changes: `current` is trained, `old` lags and draws the roll-outs.

    `active` chooses. "current" and "old" give W x + (alpha / rank) B A x. "base" gives W x, stage 1 bit for bit. `old` is held
    in buffers, so no gradient can ever reach it. A ~ N(0, (1 / rank)^2), B = 0, both float32.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.active = base.requires_grad_(False), "current"
        self.register_buffer("scale", torch.tensor(alpha / rank, device=base.weight.device))
        make = lambda *shape: torch.zeros(*shape, device=base.weight.device)
        self.lora_A = nn.Parameter(make(rank, base.in_features).normal_(std=1 / rank))
        self.lora_B = nn.Parameter(make(base.out_features, rank))
        self.register_buffer("old_A", self.lora_A.detach().clone())
        self.register_buffer("old_B", self.lora_B.detach().clone())

    def forward(self, x):
        y = self.base(x)
        if self.active == "base":
            return y
        A, B = (self.lora_A, self.lora_B) if self.active == "current" else (self.old_A, self.old_B)
        return y + (self.scale * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)


def policy_layers(module) -> dict:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, PolicyLinear)}


def add_policies(sana, rank: int, alpha: float) -> None:
    """PolicyLinear on attn1 and attn2's to_q, to_k, to_v, to_out.0 of every block; SANA-1.5 at rank 32: 22 937 600.

    DIFFERS: Table I says that stage 2 trains SANA; the authors' code trains this LoRA.
    """
    names = [name for name, layer in sana.named_modules() if isinstance(layer, nn.Linear)
             and re.search(r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$", name)]
    for name in names:
        sana.set_submodule(name, PolicyLinear(sana.get_submodule(name), rank, alpha))


@contextmanager
def acting(sana, policy: str):
    """Inside, the velocity is that of `policy`: current, old or base."""
    layers = policy_layers(sana).values()
    for layer in layers:
        layer.active = policy
    try:
        yield
    finally:
        for layer in layers:
            layer.active = "current"


@torch.no_grad()
def update_old(sana, decay: float) -> None:
    """theta_old <- decay theta_old + (1 - decay) theta."""
    for layer in policy_layers(sana).values():
        layer.old_A.lerp_(layer.lora_A, 1 - decay)
        layer.old_B.lerp_(layer.lora_B, 1 - decay)


def save_peft(sana, folder) -> None:
    """adapter_model.safetensors + adapter_config.json, as peft writes and the authors' release has them."""
    layers, state = policy_layers(sana), {}
    for name, layer in layers.items():
        state[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
        state[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
    rank, scale = len(layer.lora_A), layer.scale.item()
    save_part(Path(folder) / "adapter_model.safetensors", state)
    config = dict(peft_type="LORA", r=rank, lora_alpha=scale * rank, lora_dropout=0.0, bias="none",
                  target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian")
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=1))


def load_peft(sana, where: str) -> None:
    """Put the preference LoRA of a folder, or of a run of ours, in as the current and the old policy."""
    folder = Path(where) / "lora" if (Path(where) / "lora").is_dir() else Path(where)
    config = read_json(folder / "adapter_config.json")
    if special := [name for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if config.get(name)]:
        raise UserError(f"--lora {where}: its adapter_config.json has {special[0]}, which is not supported here")
    rank, alpha = config["r"], config["lora_alpha"]
    if not policy_layers(sana):
        add_policies(sana, rank, alpha)
    names = {f"base_model.model.{layer}.lora_{x}.weight": f"{layer}.lora_{x}" for layer in policy_layers(sana) for x in "AB"}
    state = {names.get(name, name): t for name, t in read_weights(folder / "adapter_model.safetensors").items()}
    load_strict(sana, {n: t for n, t in sana.state_dict().items() if n not in names.values()} | state, f"--lora {where}")
    for layer in policy_layers(sana).values():
        layer.scale.fill_(alpha / rank)
    update_old(sana, 0.0)


# ------------------------------------------------------------------------------------------------ losses: stage 1


def token_loss(states, head, labels, chunk: int = 2048):
    """Cross-entropy of the next token, mean over labels that are not -100 [Eq. 7, first term of Eq. 9].

    states (B, L, H), head (V, H), labels (B, L). Only wanted positions meet the head, `chunk` at a time and recomputed
    in the backward pass: the 1489 x 217 210 logits of one sample would take 1.3 GB. ValueError without any label.
    """
    wanted = labels[:, 1:] != -100
    if not wanted.any():
        raise ValueError("token_loss: every label is -100")
    h, target = states[:, :-1][wanted], labels[:, 1:][wanted]
    wide = torch.promote_types(states.dtype, torch.float32)
    piece = lambda h, t: F.cross_entropy(F.linear(h, head.to(h.dtype)).to(wide), t, reduction="sum")
    total = sum(checkpoint(piece, a, t, use_reentrant=False) for a, t in zip(h.split(chunk), target.split(chunk)))
    return total / len(target)


def interpolate(x0, eps, sigma):
    """x_t = (1 - sigma) x0 + sigma eps; sigma (B,), 1 is pure noise."""
    sigma = sigma.view(-1, *[1] * (x0.dim() - 1))
    return (1 - sigma) * x0 + sigma * eps


def flow_loss(velocity, x0, sigma, eps):
    """L_diff = E || v(x_t, sigma) - (eps - x0) ||^2, mean over elements [Eq. 9]; velocity: any callable."""
    return (velocity(interpolate(x0, eps, sigma), sigma) - (eps - x0)).square().mean()


def uniform_sigma(batch: int, device=None):
    """(B,) of {1 .. 1000} / 1000, no time shift and no logit-normal. UNSTATED: the authors' code."""
    return torch.randint(1, 1001, (batch,), device=device) / 1000


def latent_consistency_loss(z_lq, z_hq):
    """|| sg[E_0(x_HQ)] - E_psi(x_LQ) ||^2 on scaled latents, mean over elements [Eq. 10]."""
    return (z_hq.detach() - z_lq).square().mean()


def drop_condition(cond, share: float):
    """The null condition, all zeros after the connectors, for a random `share` of the samples.

    DIFFERS: in stage 1.1 the authors zero the states before the connector, a null that inference never uses.
    """
    keep = torch.rand(len(cond), 1, 1, device=cond.device) >= share
    return cond * keep


def diffusion_loss(model, cfg, cond, z_hq):
    """L_diff at random noise levels, for a condition that is sometimes dropped."""
    cond = drop_condition(cond, cfg.condition_dropout)
    sigma = uniform_sigma(len(z_hq), z_hq.device)
    return flow_loss(lambda x, s: model.velocity(x, s, cond), z_hq, sigma, torch.randn_like(z_hq))


def teacher_forced(model, vocab, cfg, batch, source, answer) -> tuple:
    """(states (B, L, H), sequence) with a given answer as input: the true one, or the model's own (`write_answers`)."""
    sequence = build_sequence(vocab, source, batch["captions"], answer, batch["tasks"], count=model.tatok.count,
                              ce_on_text=not cfg.as_printed)       # DIFFERS: Eq. 9 is over visual tokens, the code over all
    return model.integrator(sequence), sequence


def semantic_loss(model, vocab, cfg, batch, source=None):
    """Stage 1.1: (L = L_CE + lambda L_diff, its parts) [Eq. 9]; the condition is the semantic tokens alone.

    batch: hq, lq (B, 3, S, S), captions, tasks ("restore" or "copy"). source: tokens in place of the degraded face's.
    """
    answer, z_hq = model.tatok.encode(batch["hq"]), model.encode(batch["hq"])
    source = model.tatok.encode(batch["lq"]) if source is None else source
    states, sequence = teacher_forced(model, vocab, cfg, batch, source, answer)
    ce = token_loss(states, model.integrator.head, sequence.labels)
    states = answer_states(states, sequence.start, model.tatok.count)
    diffusion = diffusion_loss(model, cfg, model.condition(states), z_hq)
    return ce + cfg.diffusion_weight * diffusion, dict(ce=ce, diffusion=diffusion)


@torch.no_grad()
def write_answers(model, vocab, cfg, batch, source, answer):
    """A share of the rows of `answer` as the model itself generates them, the likeliest tokens (inference may draw them).

    DIFFERS: the authors (and the paper preset) train on the true tokens, which inference does not have.
    """
    own = (torch.rand(len(answer)) < cfg.own_answers).nonzero()[:, 0].tolist() if cfg.own_answers else []
    if not own:
        return answer
    prompt = build_sequence(vocab, source[own], [batch["captions"][i] for i in own], None,
                            [batch["tasks"][i] for i in own], count=model.tatok.count)
    answer = answer.clone()
    answer[own] = model.integrator.generate(prompt, vocab, model.tatok.count)[0]
    return answer


def texture_loss(model, vocab, cfg, batch, ce_weight: float = 0.0):
    """Stage 1.2: (L = lambda L_diff + L_vae, its parts) [Eq. 10]; the condition is both kinds of tokens.

    E_psi sees the degraded face and learns from both losses. With ce_weight (`joint_loss`) the language model learns too.
    """
    z_hq, z_lq, answered, parts = model.encode(batch["hq"]), model.encode_lq(batch["lq"]), None, {}
    if cfg.semantic:
        answer, source = model.tatok.encode(batch["hq"]), model.tatok.encode(batch["lq"])
        if not ce_weight:
            answer = write_answers(model, vocab, cfg, batch, source, answer)
        with torch.set_grad_enabled(ce_weight > 0):
            states, sequence = teacher_forced(model, vocab, cfg, batch, source, answer)
        answered = answer_states(states, sequence.start, model.tatok.count)
        if ce_weight:
            parts["ce"] = token_loss(states, model.integrator.head, sequence.labels)
    parts["diffusion"] = diffusion_loss(model, cfg, model.condition(answered, z_lq), z_hq)
    parts["vae"] = latent_consistency_loss(z_lq.float(), z_hq)
    return ce_weight * parts.get("ce", 0.0) + cfg.diffusion_weight * parts["diffusion"] + parts["vae"], parts


def joint_loss(model, vocab, cfg, batch):
    """Table IX's joint optimisation: CE + diffusion + latent consistency at once, on true tokens alone."""
    return texture_loss(model, vocab, cfg, batch, ce_weight=1.0)


# ------------------------------------------------------------------------------------------------ losses: stage 2


def total_reward(scores: dict, weights: dict):
    """R = sum_k w_k R_k [Eq. 11]: {name: (B,)}, {name: float} -> (B,). DIFFERS: the paper normalises R_k, the code does not."""
    return sum(weight * scores[name] for name, weight in weights.items())


def optimality(rewards, group, scale: float = 5.0, eps: float = 1e-4):
    """r = 1/2 + 1/2 clip[(R - mean of its group) / Z, -1, 1], Z = scale (std over all + eps) -> (B,) [Eq. 12].

    rewards (B,), group (B,) int: which roll-outs belong to one degraded face. Equal rewards give 1/2.
    UNSTATED: the paper says Z is a scaling factor; 5 standard deviations of the whole batch are the authors' code.
    """
    number = group.unique(return_inverse=True)[1]
    zeros = torch.zeros(int(number.max()) + 1, dtype=rewards.dtype, device=rewards.device)
    means = zeros.index_add(0, number, rewards) / zeros.index_add(0, number, torch.ones_like(rewards))
    advantage = (rewards - means[number]) / (rewards.std(unbiased=False) + eps)
    return (0.5 + 0.5 * advantage / scale).clamp(0, 1)


def implicit_velocities(v, v_old, beta: float):
    """v+ = (1 - beta) v_old + beta v [Eq. 13], v- = (1 + beta) v_old - beta v [Eq. 14]: v- mirrors v+ at v_old.

    DIFFERS: in print v_old is stage 1's velocity (--as_printed).
    """
    return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v


def nft_loss(v, v_old, x_t, x0, sigma, r, beta, v_ref=None, kl_weight=0.0, adv_clip=5.0, form="x0"):
    """L = E[ r || v+ - (eps - x0) ||^2 + (1 - r) || v- - (eps - x0) ||^2 ]  [Eq. 4, 15] + kl_weight || v - v_ref ||^2.

    v, v_old, v_ref, x_t, x0 (B, c, h, w); sigma, r (B,). v_ref is stage 1's velocity, for the KL term alone: not the paper's
    v_ref, which is v_old here. form "velocity" is the printed loss. DIFFERS: "x0" is the authors' code: the same errors as
    clean latents, each divided by its own mean size (no gradient through that), times adv_clip / beta. At v = v_old the
    gradient then has the factor adv_clip (2 r - 1), the advantage in standard deviations: advantage-weighted flow matching.
    The value there does not depend on r.
    """
    level = sigma.view(-1, *[1] * (x0.dim() - 1))

    def error(velocity):  # -> (B,)
        if form == "velocity":
            return (velocity - (x_t - x0) / level).square().flatten(1).mean(1)     # (x_t - x0) / sigma = eps - x0
        miss = x_t - level * velocity - x0
        return miss.square().flatten(1).mean(1) / miss.detach().abs().flatten(1).mean(1).clamp(min=1e-5)

    plus, minus = implicit_velocities(v, v_old.detach(), beta)
    loss = (r * error(plus) + (1 - r) * error(minus)).mean()
    loss = loss * (adv_clip / beta if form == "x0" else 1)
    return loss if v_ref is None else loss + kl_weight * (v - v_ref.detach()).square().mean()


def old_policy_decay(step: int, kind: int) -> float:
    """eta of theta_old <- eta theta_old + (1 - eta) theta after `step` optimiser steps; `kind` 0, 1, 2 [NFT]."""
    return (0.0, min(0.001 * step, 0.5), min(0.0075 * max(0, step - 75), 0.999))[kind]


def grpo_loss(log_prob, old_log_prob, advantage, clip: float):
    """- E min( ratio A, clip(ratio, 1 - clip, 1 + clip) A ), ratio = exp(log_prob - old_log_prob) [Flow-GRPO].

    The baseline of Figure 6: log_prob, old_log_prob, advantage (B,) -> scalar. `sde_sample` is its sampler.
    """
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


# ------------------------------------------------------------------------------------------------ sampler


def sigma_grid(steps: int) -> list:
    """1, (steps - 1) / steps, .., 1 / steps, 0. DIFFERS: the authors' roll-outs stop at 1 / steps, noise left in."""
    return [1 - i / steps for i in range(steps)] + [0.0]


@torch.no_grad()
def euler_sample(velocity, x, sigmas):
    """dx / dsigma = v(x, sigma) from sigmas[0] to sigmas[-1], left-point Euler [Eq. 8]. velocity(x, (B,)) -> like x."""
    for now, after in zip(sigmas, sigmas[1:]):
        x = x + (after - now) * velocity(x, x.new_full((len(x),), now))
    return x


@torch.no_grad()
def dpm_solver_sample(velocity, x, sigmas):
    """DPM-Solver++(2M) for the flow [Eq. 8]: alpha = 1 - sigma, lambda = log(alpha / sigma), D = x - sigma v.

    First and last step are first-order (DDIM), and so is the second where the first left from sigma 1, as lambda is
    infinite there. sigmas may end at 0.
    """
    half_log_snr = lambda s: math.log((1 - s) / s) if 0 < s < 1 else math.inf if s == 0 else -math.inf
    previous = None                                                                          # (D, lambda) of last step
    for i, (s, after) in enumerate(zip(sigmas, sigmas[1:])):
        D, lam = x - s * velocity(x, x.new_full((len(x),), s)), half_log_snr(s)
        if previous is None or i == len(sigmas) - 2 or not math.isfinite(previous[1]):
            x = (1 - after) * D + after / s * (x - (1 - s) * D)
        else:
            h = half_log_snr(after) - lam
            slope = (D - previous[0]) * h / (2 * (lam - previous[1]))                        # (D_i - D_i-1) / (2 r0)
            x = after / s * x - (1 - after) * math.expm1(-h) * (D + slope)
        previous = D, lam
    return x


def flow_sde_step(v, x, s: float, after: float, noise: float, x_next=None):
    """One step of the SDE with the flow's marginals [Flow-GRPO] -> (x_next, log-probability (B,), mean over elements).

    x' = x + [v + g^2 / (2 s) (x + (1 - s) v)] ds + g sqrt(|ds|) eps, g = noise sqrt(s / (1 - s)). x_next None: drawn.
    """
    g = noise * math.sqrt(s / (1 - (after if s >= 1 else s)))      # infinite at s = 1: the next level's there
    ds = after - s
    mean, std = x + (v + g * g / (2 * s) * (x + (1 - s) * v)) * ds, g * math.sqrt(-ds)
    if x_next is None:
        x_next = mean + std * torch.randn_like(x)
    log_prob = -((x_next.detach() - mean) ** 2) / (2 * std ** 2) - math.log(std * math.sqrt(2 * math.pi))
    return x_next.detach(), log_prob.flatten(1).mean(1)


@torch.no_grad()
def sde_sample(velocity, x, sigmas, noise: float):
    """-> path [x at each sigma], log-probabilities (B, steps - 1). The last step is the ODE's and draws nothing."""
    path, log_probs = [x], []
    for s, after in zip(sigmas[:-2], sigmas[1:-1]):
        x, log_prob = flow_sde_step(velocity(x, x.new_full((len(x),), s)), x, s, after, noise)
        path.append(x), log_probs.append(log_prob)
    path.append(euler_sample(velocity, x, sigmas[-2:]))
    return path, torch.stack(log_probs, 1)


def guided(velocity, cond, scale: float):
    """velocity(x, sigma, cond) -> callable (x, sigma): v_null + scale (v - v_null), the null condition being zeros."""
    if scale == 1:
        return lambda x, sigma: velocity(x, sigma, cond)
    both = torch.cat([torch.zeros_like(cond), cond])

    def field(x, sigma):
        null, full = velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return null + scale * (full - null)
    return field


# How tokens are chosen [sec. IV-B1: sampled]. UNSTATED: the three numbers are the authors' script's for stage 1.
CHOICE = {"sample": dict(top_k=1200, top_p=0.95, temperature=1.0), "greedy": dict(temperature=0.0)}


@torch.no_grad()
def read_face(model, vocab, cfg, lq, captions, generator=None, texture: bool = True):
    """Degraded faces (B, 3, S, S) -> C: Qwen3 generates the answer's tokens, E_psi reads the texture (from stage 1.2 on)."""
    states = None
    if cfg.semantic:
        sequence = build_sequence(vocab, model.tatok.encode(lq), captions)
        states = model.integrator.generate(sequence, vocab, model.tatok.count, generator=generator, **CHOICE[cfg.ar])[1]
    return model.condition(states, model.encode_lq(lq) if texture else None)


@torch.no_grad()
def draw_face(model, cfg, cond, noise):
    """C and noise (B, c, h, w) -> faces (B, 3, S, S)."""
    sampler = euler_sample if cfg.solver == "euler" else dpm_solver_sample
    x0 = sampler(guided(model.velocity, cond, cfg.guidance_scale), noise, sigma_grid(cfg.num_inference_steps))
    return model.decode(x0)


def latent_shape(model, cfg) -> tuple:
    """(c, h, w) of a face's latent."""
    side = cfg.image_size // 2 ** (len(model.vae.config.encoder_block_out_channels) - 1)
    return model.vae.config.latent_channels, side, side


# ------------------------------------------------------------------------------------------------ rewards

# File or folder of each network in --rewards, under the names of their releases. CLIP's tokenizer serves all three CLIPs.
REWARD_FILES = {"hps": "HPS_v2.1_compressed.pt", "clip": "clip-vit-large-patch14", "pick": "PickScore_v1",
                "identity": "resnet18_110.pth", "lpips": "vgg16-397923af.pth", "lmd": "WFLW_4HG.pth"}
READS = {"clip": "attributes", "pick": "attributes", "identity": "identity", "lmd": "landmarks"}  # labels a reader must know


def reward_weights(cfg) -> dict:
    """{name: weight} of the rewards that count."""
    return {name: getattr(cfg, f"{name}_weight") for name in REWARD_FILES if getattr(cfg, f"{name}_weight")}


def build_rewards(cfg, device):
    """Callable (images, reference, captions) -> {name: (B,)}, images in [-1, 1]: of --rewards, or of face readers a and c."""
    weights = reward_weights(cfg)
    if not cfg.rewards:
        labels = {READS[name] for name in weights if name in READS}
        return toy_rewards(*(metrics.load_reader(name, cfg.readers, labels).to(device) for name in "ac"))
    networks = {name: real_reward(cfg.rewards, name, device) for name in weights}
    return lambda *faces_and_captions: {name: network(*faces_and_captions) for name, network in networks.items()}


@torch.no_grad()
def score(rewards, images, reference, captions, size: int = 32) -> dict:
    """{name: (B,) float32}: images, reference (B, 3, S, S) in [-1, 1], of which `size` are looked at together."""
    found = [rewards(images[i:i + size].float(), reference[i:i + size], captions[i:i + size])
             for i in range(0, len(images), size)]
    return {name: torch.cat([scores[name].float() for scores in found]) for name in found[0]}


def landmark_reward(network):
    """Callable: 1 / (1 + d / 20), d the mean distance of 98 points in pixels of a 512 px face; 0.01 where none is found."""
    def reward(x, reference, captions):
        d = metrics.landmark_distance(network.landmarks(x), network.landmarks(reference)) * 512 / x.shape[-1]
        return torch.where(d.isfinite(), 1 / (1 + d / 20), 0.01)
    return reward


def real_reward(folder, name: str, device):
    """Callable (images, reference, captions) -> (B,): one of the paper's reward networks, from its file in `folder`."""
    path = Path(folder) / REWARD_FILES[name]
    if name in ("hps", "clip", "pick"):
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel
        tokenizer = from_folder(AutoTokenizer, str(Path(folder) / REWARD_FILES["clip"]), "rewards")
        if name == "hps":
            model = CLIPModel(CLIPConfig(**HPS_CLIP))
            load_strict(model, convert_open_clip(read_weights(path)), path)
        else:
            model = from_folder(CLIPModel, str(path), "rewards")
        return ClipReward(name, model.to(device), tokenizer, model.logit_scale.exp().item() / 26 if name == "pick" else 1.0)
    if name == "identity":
        network = metrics.load_weights(metrics.ArcFaceGray(), path).to(device)
        return lambda x, reference, captions: metrics.identity_similarity(network.embed(x), network.embed(reference))
    if name == "lpips":
        network = metrics.lpips_network("vgg", path).to(device)
        return lambda x, reference, captions: -network(x, reference).flatten()
    return landmark_reward(metrics.load_weights(metrics.FAN98(), path).to(device))


class ClipReward:
    """cos(text, image) x scale of a CLIPModel: CLIPScore (1), PickScore (exp(logit_scale) / 26), HPSv2.1 (1)."""
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, name: str, model, tokenizer, scale: float = 1.0):
        self.name, self.tokenizer, self.scale = name, tokenizer, scale
        self.model = model.float().eval().requires_grad_(False)
        self.side, self.length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def pixels(self, images):
        """(B, 3, S, S) in [-1, 1] -> (B, 3, side, side) in [0, 1], resized as in each network's own code.

        DIFFERS: for PickScore Pillow also rounds between rows and columns; pixels are at most one level of 255 apart.
        """
        eight_bits = lambda x: (x.clamp(0, 1) * 255).round() / 255 if self.name == "pick" else x
        mode = "bilinear" if self.name == "clip" else "bicubic"
        return eight_bits(F.interpolate(eight_bits(images / 2 + 0.5), (self.side, self.side), mode=mode, antialias=True))

    def __call__(self, images, reference, captions):
        x = self.pixels(images)
        x = (x - x.new_tensor(self.MEAN).view(3, 1, 1)) / x.new_tensor(self.STD).view(3, 1, 1)
        text = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.length,
                              return_tensors="pt").to(images.device)
        image = self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)
        text = self.model.text_projection(self.model.text_model(**text).pooler_output)
        return self.scale * F.cosine_similarity(image, text)


def convert_open_clip(state: dict) -> dict:
    """open_clip's parameter names (HPSv2.1's file) -> those of transformers' CLIPModel."""
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    fixed = {"visual.class_embedding": "vision_model.embeddings.class_embedding", "logit_scale": "logit_scale",
             "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}
    found = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)\.(\w+)", name)
        if name in ("visual.proj", "text_projection"):
            found[name.replace("visual.proj", "visual_projection") + ".weight"] = tensor.T.contiguous()
        elif name in fixed or stem in fixed:
            found[fixed.get(name) or f"{fixed[stem]}.{leaf}"] = tensor
        elif block:
            side, number, part, leaf = block.groups()
            where = f"{'vision' if side else 'text'}_model.encoder.layers.{number}"
            if part == "attn":                                     # query, key and value lie in one matrix
                for letter, piece in zip("qkv", tensor.chunk(3)):
                    found[f"{where}.self_attn.{letter}_proj.{leaf.removeprefix('in_proj_')}"] = piece.clone()
            else:
                found[f"{where}.{names[part]}.{leaf}"] = tensor
    return found


def toy_rewards(*readers):
    """Callable (images, reference, captions) -> {name: (B,)}: face readers in place of the six networks of the paper.

    A reward is the mean over the readers: one network alone is pleased sooner than the face gets better.
    """
    def rewards(images, reference, captions):
        each = [reader_rewards(reader, images, reference, captions) for reader in readers]
        return {name: sum(found[name] for found in each) / len(each) for name in each[0]}
    return rewards


def reader_rewards(reader, images, reference, captions) -> dict:
    """{name: (B,)}, all six from one look of a face reader at images and reference."""
    seen, real = reader.stages(images), reader.stages(reference)
    looks, said = reader.score(seen), torch.stack([caption_targets(c) for c in captions]).to(images.device)
    # agreement: mean probability that what the caption says is so; 1/2 where it is silent
    probability = reader.attributes(seen[4].flatten(1)).sigmoid()
    right, silent = torch.where(said == 1, probability, 1 - probability), said.isnan()
    agreement = torch.where(silent.all(1), 0.5, right.masked_fill(silent, 0).sum(1) / (~silent).sum(1).clamp(min=1))
    identity = [F.normalize(reader.identity(stages[4].flatten(1))) for stages in (seen, real)]
    points = [reader.point_means(reader.point_logits(stages)) * 512 for stages in (seen, real)]   # pixels of a 512 px face
    lpips = sum((F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2)) for a, b in zip(seen, real))
    return dict(hps=looks, clip=agreement, pick=looks * agreement, identity=metrics.identity_similarity(*identity),
                lpips=-lpips / 2, lmd=1 / (1 + metrics.landmark_distance(*points) / 20))


def caption_targets(caption: str) -> torch.Tensor:
    """(12,) 1 where the caption says an attribute, 0 where it says the opposite, NaN where it is silent."""
    text, found = f" {' '.join(re.findall('[a-z]+', caption.lower()))} ", [math.nan] * len(ATTRIBUTES)
    for i, (_, _, on, off) in enumerate(ATTRIBUTES):
        if off and f" {off} " in text:
            found[i] = 0.0
        if f" {on} " in text:
            found[i] = 1.0
    for group in SIBLINGS:
        if any(found[i] == 1 for i in group):
            for i in group:
                found[i] = float(found[i] == 1)
    return torch.tensor(found)


# ------------------------------------------------------------------------------------------------ training


def mix_tasks(cfg, batch: dict) -> dict:
    """The batch with `tasks`: a share of its faces is to copy the clean face, a share is asked without the caption."""
    count = len(batch["hq"])
    copied, bare = torch.rand(count) < cfg.identity_share, torch.rand(count) >= cfg.caption_share
    lq = torch.where(copied.view(-1, 1, 1, 1).to(batch["lq"].device), batch["hq"], batch["lq"])
    captions = ["" if b else caption for b, caption in zip(bare, captions_of(batch))]
    return dict(batch, lq=lq, captions=captions, tasks=["copy" if c else "restore" for c in copied])


def captions_of(batch: dict) -> list:
    """B captions, empty ones where the folder has no captions.json."""
    return batch.get("captions", [""] * len(batch["hq"]))


def micro_batches(batch: dict, pieces: int) -> list:
    """The batch cut into `pieces` batches."""
    size = len(batch["hq"]) // pieces
    return [{name: values[i:i + size] for name, values in batch.items()} for i in range(0, len(batch["hq"]), size)]


def train_alignment(cfg, run, faces, model, vocab, stage: str):
    """Stage 1.1: Qwen3 generates the clean face's tokens, and its states learn to steer the frozen flow [Eq. 9].
    Stage 1.2: the flow learns to use texture tokens, and E_psi to make them from degraded faces [Eq. 10].
    Stage "joint" [Table IX]: both at once, on all losses, for the steps of both.
    """
    loss_of, steps, peak = {
        "1.1": (semantic_loss, cfg.semantic_steps, cfg.semantic_learning_rate),
        "1.2": (texture_loss, cfg.texture_steps, cfg.texture_learning_rate),
        "joint": (joint_loss, cfg.semantic_steps + cfg.texture_steps, cfg.texture_learning_rate)}[stage]
    parameters, steps, pieces = route(model, stage, cfg), min(steps, cfg.max_train_steps), cfg.gradient_accumulation_steps
    optimizer = make_optimizer(cfg, parameters, peak, betas=(0.9, 0.999), weight_decay=0.0)                      # [Table I]
    modules, factor = {"model": model}, lr_schedule(cfg, steps, floor=min(1, 1e-5 / peak))    # UNSTATED: to 1e-5, authors' code
    ema = EMA(modules, cfg.ema_decay)                              # averaged weights, for `sample`
    first = run.load(stage, modules, ema, optimizer)               # 0, or where a stopped run was saved

    for step, batch in run.batches(faces.training, stage, first, steps):  # seeds torch by (seed, stage, step)
        optimizer.zero_grad()
        for piece in micro_batches(mix_tasks(cfg, batch), pieces):
            with run.autocast():
                loss, parts = loss_of(model, vocab, cfg, piece)
            (loss / pieces).backward()                             # micro-batches add up their gradients
            run.note(**parts)
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = peak * factor(step)
        optimizer.step()
        ema.update(step)
        run.log(stage, step, grad_norm=grad_norm)                  # stops a run whose loss is not finite
        run.save(stage, step, modules, ema, optimizer)             # every --checkpointing_steps

    model.load_state_dict(ema["model"], strict=False)


def train_preference(cfg, run, faces, model, vocab):
    """Stage 2: the velocity field moves towards restorations above their group's mean reward [Eq. 11-15].

    An epoch is one optimiser step. DIFFERS: faces are degraded on the way; the authors' stage 2 reads fixed pairs.
    """
    rewards, weights, K = build_rewards(cfg, run.device), reward_weights(cfg), cfg.group_size
    torch.manual_seed(mix(cfg.seed, "policies"))
    add_policies(model.sana, cfg.rank, 2.0 * cfg.rank)             # current = old = stage 1
    parameters, steps = route(model, "2", cfg), min(cfg.preference_steps, cfg.max_train_steps)
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=1e-4)       # [Table I]
    modules = {"model": model}
    ema = EMA(modules, 0.9)
    first = run.load("2", modules, ema, optimizer)
    greedy, sigmas = dataclasses.replace(cfg, ar="greedy"), sigma_grid(cfg.rollout_steps)
    T, levels = max(1, int(cfg.rollout_steps * cfg.timestep_fraction)), torch.tensor(sigmas[:-1], device=run.device)
    toy = "" if cfg.rewards else "_toy"

    for epoch, batch in run.batches(functools.partial(training_groups, faces, cfg.groups), "2", first, steps):
        # Condition: likeliest tokens, so that the roll-outs of a face differ in their noise alone. Captions go to the
        # rewards, not into the prompt (as the authors' code; DIFFERS from sec. IV-B1)
        with run.autocast():
            cond = read_face(model, vocab, greedy, batch["lq"], [""] * len(batch["lq"])).float().repeat_interleave(K, 0)
        hq, captions = batch["hq"].repeat_interleave(K, 0), [c for c in captions_of(batch) for _ in range(K)]
        size = cfg.batch_size * cfg.groups                        # roll-outs at a time
        pieces = torch.arange(len(hq), device=run.device).split(size)

        # Roll out: the old policy draws K restorations of each face, without guidance [Eq. 8]. DIFFERS: sec. IV-C2 says the
        # current one
        noise, x0, images = torch.randn(len(hq), *latent_shape(model, cfg), device=run.device), [], []
        with torch.no_grad(), run.autocast(), acting(model.sana, "old"):
            for rows in pieces:
                x0.append(dpm_solver_sample(guided(model.velocity, cond[rows], 1.0), noise[rows], sigmas).float())
                images.append(model.decode(x0[-1]))
        x0, images = torch.cat(x0), torch.cat(images)

        # Reward, and r of each roll-out against its group [Eq. 11, 12]. DIFFERS: a group is a face; in the authors' code
        # it is a caption, so that faces with equal captions merge
        scores = score(rewards, images, hq, captions, size)
        reward = total_reward(scores, weights)
        group = torch.arange(len(hq), device=run.device) // K + run.rank * cfg.groups
        r = optimality(gathered(reward, run), gathered(group, run), cfg.adv_clip)            # over all processes
        r = r[run.rank * len(hq):][:len(hq)]

        # Update: every roll-out at T levels of its own grid; it pulls with weight r and pushes with 1 - r [Eq. 13-15]
        optimizer.zero_grad()
        order = torch.rand(len(hq), cfg.rollout_steps, device=run.device).argsort(1)[:, :T]
        for column in range(T):
            for rows in pieces:
                sigma = levels[order[rows, column]]
                x_t = interpolate(x0[rows], torch.randn_like(x0[rows]), sigma)
                with run.autocast():
                    stage1 = cfg.kl_weight or cfg.as_printed
                    v_stage1 = frozen_velocity(model, "base", x_t, sigma, cond[rows]) if stage1 else None
                    # DIFFERS: v_ref of Eq. 13-14 is stage 1 in print, in the authors' code the old policy
                    v_old = v_stage1 if cfg.as_printed else frozen_velocity(model, "old", x_t, sigma, cond[rows])
                    v = model.velocity(x_t, sigma, cond[rows])
                loss = nft_loss(v, v_old, x_t, x0[rows], sigma, r[rows], cfg.nft_beta,
                                v_stage1, cfg.kl_weight, cfg.adv_clip, "velocity" if cfg.as_printed else "x0")
                (loss * len(rows) / (T * len(hq))).backward()
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        optimizer.step()
        ema.update(epoch)                       # UNSTATED: authors' code; these weights are saved

        # The old policy follows. UNSTATED: kind 1 is the authors'
        update_old(model.sana, old_policy_decay(epoch + 1, 1))
        means = {f"reward_{name}{toy}": value.mean() for name, value in scores.items()}
        means |= {f"reward{toy}": reward.mean(), f"spread{toy}": reward.view(-1, K).std(1).mean()}
        run.log("2", epoch, every=1, **means, grad_norm=grad_norm)
        run.save("2", epoch, modules, ema, optimizer, every=min(30, cfg.checkpointing_steps))   # authors: 30 epochs

    model.load_state_dict(ema["model"], strict=False)


def training_groups(faces, groups: int, count: int, *where) -> dict:
    """The batch of an epoch of stage 2: `groups` faces, whatever --batch_size is."""
    return faces.training(groups, *where)


@torch.no_grad()
def frozen_velocity(model, policy: str, x, sigma, cond):
    """The velocity of another policy than the trained one: old, or base, which is stage 1."""
    with acting(model.sana, policy):
        return model.velocity(x, sigma, cond)


def gathered(values, run):
    """(B,) of every process, one after another."""
    if run.world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(run.world)]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def train(cfg: Train) -> None:
    """The stages asked for, in order. Each is written when it ends, with pictures of what there is."""
    order = ["1.1", "1.2", "2"] if cfg.semantic else ["1.2", "2"]
    wanted = {"all": order, "1": order[:-1]}.get(cfg.stage, [cfg.stage])
    if not cfg.semantic and cfg.stage in ("1.1", "joint"):
        raise UserError(f"--no-semantic has no --stage {cfg.stage}: there are no semantic tokens to train")
    run = Run(cfg, SETTINGS)
    if "2" in wanted:
        build_rewards(cfg, "cpu")                                  # a missing file is said now, not after days
    files = {part: path for part in PARTS if (path := run.part(part))}
    # A stage that is asked for alone comes from --output or is trained; of several stages, those in --pretrained are taken
    known = [*BEFORE[wanted[0]], *wanted] if len(wanted) > 1 or wanted[0] in files else BEFORE[wanted[0]]
    torch.manual_seed(cfg.seed)                                    # the new texture connector is the same for every --stage
    model, vocab, done = load_parts(cfg, files, known)
    needs = {"2": {"1.2", "joint"}} | ({"1.2": {"1.1"}} if cfg.semantic else {})
    for stage, before in needs.items():
        if stage in wanted and stage not in done and not before & {*done, *wanted}:
            raise UserError(f"--stage {stage} needs the stages before: train them first, or give a run that has them with "
                            "--pretrained")
    faces, held = open_faces(cfg)                                  # never mirrored: a caption may say left or right
    if "2" in wanted and cfg.rewards and not faces.captions and {"hps", "clip", "pick"} & reward_weights(cfg).keys():
        raise UserError(f"--data {cfg.data}: rewards hps, clip and pick need its captions.json; or give --hps_weight 0 "
                        "--clip_weight 0 --pick_weight 0")
    model = model.to(run.device).eval().requires_grad_(False)
    run.compile(model.children())
    if cfg.gradient_checkpointing:
        recompute_activations(model)

    for stage in wanted:
        if stage in done:
            run.say(f"stage {stage}: taken as it is")
            continue
        model.train()
        if stage == "2":
            train_preference(cfg, run, faces, model, vocab)
        else:
            train_alignment(cfg, run, faces, model, vocab, stage)
        model.eval().requires_grad_(False)
        trained = {name: tensor for name, tensor in model.state_dict().items() if re.match(PARTS[stage], name)}
        run.finish(stage, {stage: trained}, later=[part for part in PARTS if part != stage and part not in BEFORE[stage]])
        done.append(stage)
        if run.main:
            batch = held.held_out(8)
            restored = restore_held_out(cfg, run, model, vocab, batch["lq"], [""] * len(batch["lq"]), cfg.seed, stage != "1.1")
            run.show(stage, dict(lq=batch["lq"], restored_faces=restored, hq=batch["hq"]))
            if stage == "2":
                save_peft(model.sana, run.folder / "lora")
    if run.main:
        report(cfg, run, held, model, vocab, wanted[-1] != "1.1")


def recompute_activations(model) -> None:
    """Of SANA and Qwen3, in the backward pass: less memory, more time."""
    model.sana.enable_gradient_checkpointing()
    model.integrator.llm.activation_checkpointing_enable()


# ------------------------------------------------------------------------------------------------ networks, weights


def load_networks(where: str, sana: str = "", ta_tok: str = "", parts=tuple(PARTS)) -> tuple:
    """(model, vocab, finished stages, Train configuration) of a run of ours, or of a release (`load_release`)."""
    folder, trained = open_run(where, Train)
    if trained is None:
        return *load_release(folder, sana, ta_tok), Train()
    files = {part: path for part in PARTS if (path := folder / f"{part}.safetensors").exists()}
    return *load_parts(trained, files, parts), trained


def load_parts(cfg, files: dict, parts=tuple(PARTS)) -> tuple:
    """(model, vocab, finished stages): what --pretrained has, and on top the run's own `files` {stage: path}.

    A run holds what its stages trained, and nothing else. parts: the stages that may be loaded.
    """
    own = [part for part in parts if part in files]
    model, vocab, finished, _ = load_networks(cfg.pretrained, cfg.sana, cfg.ta_tok, BEFORE[own[0]] if own else parts)
    for part in own:
        if part == "2":
            add_policies(model.sana, cfg.rank, 2.0 * cfg.rank)
        rest = {name: tensor for name, tensor in model.state_dict().items() if not re.match(PARTS[part], name)}
        load_strict(model, rest | read_weights(files[part]), files[part])
    update_old(model.sana, 0.0)                                    # a file holds the trained policy alone
    return model, vocab, finished + own


def load_release(folder: Path, sana: str = "", ta_tok: str = "") -> tuple:
    """(model, vocab, finished stages) from the authors' layout, or from Qwen3 alone; --sana and --ta_tok give what it lacks.

        model.embed_tokens, layers, norm (and lm_head)   Qwen3; that of Qwen's own release gets the new tokens here
        model.diffusion_connector                        semantic connector
        model.sana                                       SANA, else --sana's transformer/
        model.sana_vae, fixed_vae                        decoder and E_psi; E_0, else --sana's vae/, else the same
        model.vae_connector                              texture connector, absent before stage 1.2
        model.vision_tower.vision_tower                  TA-Tok; a given --ta_tok replaces it

    Qwen3's sizes come from config.json. Those of SANA and the VAE come from --sana or, without it, are SANA-1.5's.
    """
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import AutoTokenizer
    state = {}
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):           # shards
        state |= read_weights(file)
    config = read_json(folder / "config.json")
    part = lambda prefix, state=state: {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    tower, arguments = read_ta_tok(ta_tok) if ta_tok else (part("model.vision_tower.vision_tower."), {})
    if not tower or "model.embed_tokens.weight" not in state:
        raise UserError(f"{folder}: lacks Qwen3, or TA-Tok, whose file --ta_tok gives")
    tatok, tower = tatok_parts(tower, arguments)
    vocab = Vocabulary(from_folder(AutoTokenizer, str(folder), "pretrained"), tatok["codes"], config.get("image_start_tag_id"))
    if "image_start_tag_id" not in config:                         # Qwen3 without image tokens
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & state.keys():
            text = state[name][:vocab.image_start]                 # the rows after these never stood for a token
            new = text.mean(0, keepdim=True).expand(vocab.size - len(text), -1)              # [BLIP3o-NEXT]
            state[name] = torch.cat([text, new])
    # transformers 4 wrote the base of the rotations as rope_theta
    rotation = {"rope_type": "default", "rope_theta": config.get("rope_theta", 1e6)}
    llm = QWEN3_17B | dict(rope_parameters=rotation) | {name: config[name] for name in QWEN3_17B if name in config}
    llm["vocab_size"] = len(state["model.embed_tokens.weight"])
    llm["tie_word_embeddings"] = "lm_head.weight" not in state or config.get("tie_word_embeddings", True)
    if config.get("image_start_token_id", vocab.first_code) != vocab.first_code or llm["vocab_size"] < vocab.size:
        raise UserError(f"{folder}: another layout; its visual tokens do not start five after image_start_tag_id, or its "
                        f"{llm['vocab_size']} tokens are fewer than {vocab.size}")
    sizes = dict(llm=llm, sana=SANA15, vae=DCAE, tatok=tatok)
    if sana:
        for key, cls, name in (("sana", SanaTransformer2DModel, "transformer"), ("vae", AutoencoderDC, "vae")):
            saved = cls.load_config(sana, subfolder=name)
            if saved.get("_class_name") != cls.__name__:
                raise UserError(f"--sana {sana}: {name}/ holds a {saved.get('_class_name')}, wanted {cls.__name__}")
            sizes[key] = {field: value for field, value in saved.items() if field[0] != "_"}
    model = PrefRestore(sizes)

    language = {n: t for n, t in part("model.").items() if n.startswith(("embed_tokens.", "layers.", "norm."))}
    load_strict(model.integrator.llm, language, f"{folder}, Qwen3")
    if not llm["tie_word_embeddings"]:
        model.integrator.lm_head.weight.data.copy_(state["lm_head.weight"])
    load_strict(model.tatok, tower, f"{ta_tok or folder}, TA-Tok")
    flow = part("model.sana.") or from_folder(SanaTransformer2DModel, sana, "sana", "transformer").state_dict()
    load_strict(model.sana, flow, f"{folder}, sana")
    if semantic := part("model.diffusion_connector."):
        load_strict(model.integrator.connector, semantic, f"{folder}, diffusion_connector")
    tuned, frozen = part("model.sana_vae."), part("fixed_vae.")
    if sana and not frozen:
        frozen = from_folder(AutoencoderDC, sana, "sana", "vae").state_dict()
    load_strict(model.vae, frozen or tuned, f"{folder}, VAE")
    load_strict(model.vae.decoder, part("decoder.", tuned or frozen), f"{folder}, sana_vae.decoder")
    load_strict(model.lq_encoder, part("encoder.", tuned or frozen), f"{folder}, sana_vae.encoder")
    if texture := part("model.vae_connector."):                    # a missing norm is that of the semantic connector
        norm = {"3.weight": semantic["3.weight"]} if semantic else {}
        load_strict(model.texture, norm | texture, f"{folder}, vae_connector")
    return model, vocab, ["1.1", "1.2"] if texture else []


class Inert:
    """Stands for every class and function in TA-Tok's file that torch does not know. It holds attributes; a call with
    arguments, which a pickle needs to do harm, fails."""


def read_ta_tok(path) -> tuple:
    """(weights, arguments) of ta_tok.pth, dict["model"]["sd"] and ["args"]; no code in the file runs.

    UNSTATED: which objects the released file holds beside tensors. Names that `weights_only` refuses become `Inert`.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
            content = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return content["sd"], content.get("args")
    except Exception as error:                                     # missing, damaged or hostile: it can raise anything
        raise UserError(f"--ta_tok {path}: not TA-Tok's file, or reading it could run code ({type(error).__name__}); "
                        "wants model.sd and model.args, saved by torch.save") from None


HEAD = 72  # channels of a SigLIP so400m head, the one size that weights do not show


def tatok_parts(state: dict, arguments) -> tuple:
    """(sizes, weights) of TATok from its released names; sizes are read off the shapes."""
    state = {name.replace("encoder.vision_model.", "encoder."): t for name, t in state.items()}
    patch = state["encoder.embeddings.patch_embedding.weight"]
    places = state["encoder.embeddings.position_embedding.weight"]
    codes, code_dim = state["bottleneck.regularizer.embedding.weight"].shape
    inner = len(state["encoder.encoder.layers.0.mlp.fc1.weight"])
    layers = 1 + max(int(m[1]) for m in (re.match(r"encoder\.encoder\.layers\.(\d+)", n) for n in state) if m)
    siglip = dict(SO400M, hidden_size=len(patch), intermediate_size=inner, num_hidden_layers=layers,
                  num_attention_heads=max(1, len(patch) // HEAD), patch_size=patch.shape[-1],
                  image_size=math.isqrt(len(places)) * patch.shape[-1])
    siglip["image_size"] = 384 if (siglip["patch_size"], len(places)) == (14, 729) else siglip["image_size"]
    for key in ("bottleneck", "args", "regularizer", "args", "l2_normalized"):               # dictionaries or `Inert` objects
        arguments = getattr(arguments, "__dict__", arguments)
        arguments = arguments.get(key) if isinstance(arguments, dict) else None
    sizes = dict(siglip=siglip, codes=codes, code_dim=code_dim, l2_normalized=arguments is not False)
    with torch.device("meta"):
        names = TATok(**sizes).state_dict()
    return sizes, {name: t for name, t in state.items() if name in names}


# ------------------------------------------------------------------------------------------------ restore, measure


def noise_like(model, cfg, count: int, generator, shared: bool = False):
    """(count, c, h, w) standard normal on the model's device, from a CPU generator: the same on every machine.

    shared: one draw for all faces.
    """
    noise = torch.randn((1 if shared else count), *latent_shape(model, cfg), generator=generator)
    return noise.expand(count, -1, -1, -1).to(model.latent_scale.device)


def restore_held_out(cfg, run, model, vocab, lq, captions, seed: int, texture: bool = True) -> torch.Tensor:
    """(N, 3, S, S) in [-1, 1] -> restored, on the CPU, in batches; noise and tokens follow from `seed`."""
    rng, found, size = torch.Generator().manual_seed(seed), [], cfg.batch_size
    for i in range(0, len(lq), size):
        x = lq[i:i + size].to(run.device)
        with run.autocast():
            cond = read_face(model, vocab, cfg, x, captions[i:i + size], rng, texture)
            found.append(draw_face(model, cfg, cond, noise_like(model, cfg, len(x), rng)).cpu())
    return torch.cat(found)


def reward_numbers(cfg, images, batch, reader) -> dict:
    """{reward_NAME_toy: mean} and their weighted sum, as a face reader sees the images that no reward knows."""
    scores = score(toy_rewards(reader), images, batch["hq"], captions_of(batch))
    known = {name: value for name, value in scores.items() if READS.get(name) not in reader.not_trained}
    weights = {name: weight for name, weight in reward_weights(cfg).items() if name in known}
    numbers = {f"reward_{name}_toy": value.mean().item() for name, value in known.items()}
    return numbers | dict(reward_toy=total_reward(known, weights).mean().item())


def report(cfg, run, held, model, vocab, texture: bool) -> None:
    """Restore faces of people the networks never saw, and measure them."""
    batch, reader = held.held_out(cfg.validation_faces), metrics.load_reader("b", cfg.readers)
    restore = lambda: restore_held_out(cfg, run, model, vocab, batch["lq"], [""] * len(batch["lq"]), cfg.seed, texture)
    found = dict(lq=batch["lq"])
    if policy_layers(model.sana):
        with acting(model.sana, "base"):
            found["stage_1"] = restore()
    found["restored_faces"] = restore()
    rows = {name: metrics.toy_scores(images, batch["hq"], reader) for name, images in found.items()}
    for name in list(rows)[1:]:
        single = reward_numbers(cfg, found[name], batch, reader)
        rows[name]["reward_toy"] = single.pop("reward_toy")        # the single rewards of restored_faces stand beside the rows
    with torch.no_grad(), run.autocast():
        rebuilt = torch.cat([model.decode(model.encode(hq.to(run.device))).cpu() for hq in batch["hq"].split(cfg.batch_size)])
    rows["reconstruction"] = metrics.toy_scores(rebuilt, batch["hq"], reader)
    protocol = metrics.toy_protocol(held.folder, cfg.degradation, len(batch["hq"]), cfg.readers) | dict(
        text="no captions in the prompt; rewards see the true ones", rewards="read by reader b; stage 2 optimises others")
    run.report(rows, {**found, "hq": batch["hq"]}, dict(model.named_children()), faces=len(batch["hq"]), **single,
               protocol=protocol)


def sample(cfg: Sample) -> None:
    """Restore a picture or a folder with trained weights, into --output."""
    run = Run(cfg)
    model, vocab, done, trained = load_networks(cfg.checkpoint, cfg.sana, cfg.ta_tok)
    texture = bool({"1.2", "joint"} & set(done))
    if not done:
        raise UserError(f"--checkpoint {cfg.checkpoint}: no stage is trained yet; go on with that training")
    if cfg.lora:
        load_peft(model.sana, cfg.lora)
    model.to(run.device).eval().requires_grad_(False)
    run.compile(model.children())
    choices = {name: getattr(cfg, name) for name in ("num_inference_steps", "solver", "guidance_scale", "ar")}
    trained = dataclasses.replace(trained, **{name: value for name, value in choices.items() if value})
    captions = read_json(cfg.captions) if cfg.captions else {}
    captions = {Path(name).stem: caption for name, caption in captions.items()} | captions   # names may lack the suffix
    unknown = getattr(vocab.tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in vocab.encode(" ".join([cfg.caption, *captions.values()])):
        run.say("the captions have words that this tokenizer does not know; they are not read")

    def restore_batch(lq, names):
        # Every face gets the same noise, so that its result depends on the seed and not on its place in the folder.
        # Where tokens are drawn, one face is read at a time for the same reason.
        dice = lambda: torch.Generator().manual_seed(cfg.seed)
        size = 1 if trained.ar == "sample" else len(lq)
        texts = [captions.get(name, cfg.caption) for name in names]
        with run.autocast(), acting(model.sana, cfg.policy):
            cond = torch.cat([read_face(model, vocab, trained, lq[i:i + size], texts[i:i + size], dice(), texture)
                              for i in range(0, len(lq), size)])
            return {"restored_faces": draw_face(model, trained, cond, noise_like(model, trained, len(lq), dice(), shared=True))}

    restore_folder(cfg, restore_batch, trained.image_size, run.device)


VERBS = {"train": (Train, {"toy": TOY_VALUES, "paper": {}}, train), "sample": (Sample, {}, sample)}

if __name__ == "__main__":
    command_line(__doc__, VERBS)
