"""Pref-Restore: discrete semantics from a language model steer a flow that restores a face; preferences then refine it.

Paper: "Bridging Information Asymmetry: A Hierarchical Framework for Blind Face Restoration with Reduced Uncertainty",
arXiv 2601.19506 v3; equations, sections and tables are numbered as in v3. A degraded face is read twice. TA-Tok turns
it into visual words and Qwen3, given those words and perhaps a caption, writes the words of the clean face: its hidden
states are the semantic tokens. The encoder of the autoencoder, tuned on degraded faces, gives the texture tokens. Both
go into the cross-attention of SANA, a flow on latents. Training is staged (meaning, texture, preference): trained at
once, the parts disturb each other. Stage 2 (DiffusionNFT: negative-aware fine-tuning) draws groups of restorations,
rewards looks *and* likeness, and moves the velocity field towards the better half of each group.

    paper         name here    shape              range       meaning
    x_LQ, x_HQ    lq, hq       (B, 3, S, S)       [-1, 1]     degraded and clean face
    T             caption      str                            what the face shows, may be empty
    s_1..s_729    tokens       (B, N)             0..65535    TA-Tok's visual words, N = 27 x 27
    S             states       (B, N + 1, H)                  Qwen3's last hidden states at <S0>, s_1 .. s_N
    Z_LQ          z_lq         (B, c, h, w)                   scaled latent of the trained encoder E_psi
    z_0           x0, z_hq     (B, c, h, w)       sigma = 0   scaled latent of the frozen encoder E_0
    z_t           x, x_t       (B, c, h, w)                   (1 - sigma) x0 + sigma eps; t of the paper is sigma here
    v_theta       v            (B, c, h, w)                   velocity eps - x0, from sigma = 1 (noise) to 0 (face)
    v_old         v_old        (B, c, h, w)                   the lagged policy that draws the roll-outs
    C             cond         (B, N + 1 + h w, D)            semantic tokens, then texture tokens
    r             r            (B,)               [0, 1]      optimality probability of a roll-out

    [Eq. 1-4] implicit_velocities, nft_loss   [Eq. 7] SemanticIntegrator.generate, token_loss
    [Eq. 8] euler_sample, dpm_solver_sample   [Eq. 9] semantic_loss   [Eq. 10] texture_loss, latent_consistency_loss
    [Eq. 11] total_reward   [Eq. 12] optimality   [Eq. 13-14] implicit_velocities   [Eq. 15] nft_loss
    [Eq. 5-6] are the Bayesian reading, with nothing to compute   [Eq. 16] common.degrade, preset pref_restore

Run `python pref_restore.py train` (toy world, CPU) or `--preset paper --data FFHQ --captions FILE`; then `sample`.
Left out: the making of captions (Qwen2.5-VL), BLIP3o-NEXT's own pre-training (toy stage `prior` stands in for it).
"""
import copy
import dataclasses
import functools
import inspect
import json
import math
import re
import typing
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# common comes first: it sets GOMP_SPINCOUNT before torch is imported
from common import (ATTRIBUTES, DEGRADATIONS, DEGRADATION_NAMES, SIBLINGS, Faces, Run, SampleFlags, Stage, TrainFlags,
                    UserError, WordTokenizer, at_once, command_line, degrade, find_checkpoint, from_folder, from_pil,
                    is_run, list_images, load_model, load_strict, make_optimizer, mix, not_half, output_names,
                    print_ablation, print_table, read_curves, read_weights, refuse_unread, restore_folder, run_ablation,
                    same_settings, save_model, saved_flags, shared_parts, to_pil, verbalise, versions, warmup_cosine,
                    whole_file, write_curve, write_grid, write_json)

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

import metrics

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train the tokenizers and the prior (toy only), stages 1.1, 1.2 and 2, then restore held-out faces."""
    output: str = "runs/pref_restore"      # folder for weights, checkpoints, log and pictures
    degradation: DEGRADATION_NAMES = "noisy"  # preset of common.DEGRADATIONS
    batch_size: int = 32                   # faces per process and micro-batch; paper 128 in all
    ema_decay: float = 0.995               # of the averaged weights that are saved and sampled
    checkpointing_steps: int = 200         # steps between saves of state.pt
    stage: typing.Literal["all", "tokenizer", "prior", "1.1", "1.2", "joint", "2"] = "all"  # one stage, or all in order
    joint: bool = False                    # Table IX: one joint stage in place of 1.1 and 1.2
    semantic: bool = True                  # Table VII: --no-semantic conditions on texture tokens alone
    captions: str = ""                     # JSON of captions for --data: {"file": text} or [{"image": , "caption": }]
    bank: int = 4096                       # clean faces drawn, coded and captioned once (0: fresh ones every step)
    # released networks to start from; each empty one is toy-sized and trained from nothing
    pretrained: str = ""                   # folder or hub id: one of our runs, or the authors' checkpoint layout
    sana: str = ""                         # diffusers folder or hub id with transformer/ and vae/
    llm: str = ""                          # transformers folder or hub id of Qwen3, with its tokenizer
    ta_tok: str = ""                       # TA-Tok's file ta_tok.pth
    gradient_checkpointing: bool = False   # recompute activations of SANA and Qwen3 in the backward pass
    # sizes of the toy networks
    token_side: int = 4                    # N = token_side^2 visual words; TA-Tok 27
    codes: int = 512                       # visual words; TA-Tok 65 536
    code_dim: int = 32                     # width of the bottleneck
    tokenizer_width: int = 96              # of the SigLIP encoder; so400m 1152
    llm_width: int = 128                   # H; Qwen3-0.6B 1024, 1.7B 2048
    llm_layers: int = 4                    # Qwen3 28
    context: int = 160                     # longest sequence in tokens; authors 2048
    latent_channels: int = 32              # c; DC-AE 32
    vae_widths: tuple[int, ...] = (32, 32, 64, 128)  # channels per level; DC-AE 128 256 512 512 1024 1024
    sana_heads: int = 4                    # of 32 channels each; SANA-1.5 70
    sana_layers: int = 6                   # SANA-1.5 20
    # stages tokenizer and prior (stand-ins for DC-AE, TA-Tok and BLIP3o-NEXT)
    tokenizer_steps: int = 450             # both autoencoders at once, on clean and degraded faces
    tokenizer_learning_rate: float = 5e-3  # peak of the cosine
    latent_noise: float = 0.1              # noise on the latent in units of its deviation: forgives the flow's errors
    perceptual_weight: float = 0.05        # of the reader's features in the autoencoder's loss
    prior_steps: int = 400                 # copying tokens, captions to tokens, tokens to faces
    prior_learning_rate: float = 1e-2      # peak of the cosine
    # stages 1.1 and 1.2
    semantic_steps: int = 200              # stage 1.1; Table IX 50 000
    semantic_learning_rate: float = 5e-3   # stage 1.1, peak; paper 1e-4
    texture_steps: int = 500               # stage 1.2; Table IX 50 000
    texture_learning_rate: float = 1e-2    # stage 1.2, peak; paper 2e-5
    joint_steps: int = 700                 # of --joint, as many as 1.1 and 1.2 together; section V-F 100 000
    joint_learning_rate: float = 1e-2      # of --joint; authors 2e-5
    min_learning_rate: float = 1e-4        # end of every cosine; authors 1e-5
    warmup_ratio: float = 0.01             # share of the steps with linear warm-up
    diffusion_weight: float = 1.0          # lambda of Eq. 9. UNSTATED: authors 1
    vae_weight: float = 1.0                # of the latent consistency, Eq. 10
    caption_share: float = 0.9             # share of prompts with the caption
    identity_share: float = 0.2            # share of samples whose input is the clean face (authors' code: a side task)
    condition_dropout: float = 0.1         # share of samples with the null condition, for guidance
    ce_on_text: bool = True                # token loss on the prompt's words too, as the authors' code
    train_caption_projection: bool = True  # stage 1.1 trains SANA's caption_* (code); off: SANA frozen (paper)
    tie_connector_norm: bool = False       # texture connector keeps the semantic connector's RMSNorm, as the release
    own_answers: float = 1.0               # stage 1.2: share of answers the model writes itself; paper preset 0
    # stage 2
    algorithm: typing.Literal["nft", "grpo"] = "nft"  # DiffusionNFT, or the policy-gradient baseline of Figure 6
    preference_steps: int = 100            # epochs of roll-outs
    learning_rate: float = 2e-3            # stage 2, of the LoRA, constant; paper 3e-4
    preference_weight_decay: float = 1e-4  # of stage 2, whose optimiser is AdamW whatever --optimizer says
    checkpointing_epochs: int = 30         # epochs of stage 2 between saves of state.pt, as the authors
    updates_per_epoch: int = 2             # optimiser steps on one set of roll-outs; authors 1
    rank: int = 16                         # of the LoRA; authors 32
    lora_alpha: float = 32.0               # authors 64
    groups: int = 8                        # degraded faces per process and epoch; authors 48 over 8 GPUs
    group_size: int = 12                   # K roll-outs of each; authors 24
    rollout_batch: int = 96                # roll-outs per forward; Table I 72, 9 a GPU
    rollout_steps: int = 10                # solver steps of a roll-out; authors 30
    timestep_fraction: float = 0.3         # share of those noise levels trained on; authors 0.99 (29 of 30)
    nft_beta: float = 0.1                  # beta of Eq. 13-14
    nft_form: typing.Literal["x0", "velocity"] = "x0"  # Eq. 15 on clean latents, self-normalised (code), or as printed
    anchor: typing.Literal["old", "stage1"] = "old"  # v_ref of Eq. 13-14: the lagged policy (code) or Stage 1 (paper)
    decay_kind: int = 1                    # old-policy decay: 0 copies, 1 slow then half, 2 from step 75 on
    adv_clip: float = 1.5                  # clip of the advantage, the c of Z = c std in Eq. 12; authors 5
    kl_weight: float = 0.0                 # distance to Stage 1's velocity; authors 1e-4
    policy_ema_decay: float = 0.9          # of the weights that are saved and sampled after stage 2
    grpo_noise: float = 0.7                # a of the flow-SDE's noise a sqrt(sigma / (1 - sigma))
    grpo_clip: float = 1e-3                # of the probability ratio
    # rewards, Eq. 11
    rewards: typing.Literal["toy", "real"] = "toy"  # read by reader_a and _c, or by the networks named below
    # (toy weights: a fidelity reward deviates by 0.125 over the faces of stage 1.2, one of looks by 0.03)
    hps_weight: float = 0.6                # HPSv2.1, authors 1; toy: quality
    clip_weight: float = 0.25              # CLIPScore, authors 1; toy: agreement with the caption
    pick_weight: float = 0.35              # PickScore, authors 1; toy: quality x agreement
    identity_weight: float = 0.6           # ArcFace cosine, authors 0.5
    lpips_weight: float = 0.45             # minus LPIPS, authors 0.5
    lmd_weight: float = 2.0                # 1 / (1 + landmark distance / 20), authors 0.5
    clip: str = ""                         # folder of CLIP ViT-L/14 (its tokenizer also serves HPS and PickScore)
    hps: str = ""                          # HPS_v2.1_compressed.pt (open_clip's ViT-H/14)
    pick: str = ""                         # folder of PickScore_v1
    arcface: str = ""                      # resnet18_110.pth of VQFR
    fan: str = ""                          # WFLW_4HG.pth of AdaptiveWingLoss
    vgg: str = ""                          # torchvision's vgg16 for LPIPS (default: torch hub's cache)
    # restoring
    num_inference_steps: int = 10          # authors 30
    solver: typing.Literal["euler", "dpm"] = "dpm"  # authors: Euler to restore, DPM-Solver++(2M) in roll-outs
    guidance_scale: float = 1.0            # 1 is no guidance; the authors use 2
    ar: typing.Literal["sample", "greedy"] = "sample"  # visual words are drawn, as section IV-B1 says, or the likeliest
    top_p: float = 0.95                    # with --ar sample. UNSTATED: authors' code, as top_k
    top_k: int = 1200                      # with --ar sample (0: all)
    temperature: float = 1.0               # with --ar sample
    consistency_faces: int = 32            # faces of the seed-consistency numbers
    consistency_seeds: int = 8             # restorations of each (0: no such numbers). UNSTATED in the text we have
    text: typing.Literal["none", "true", "read", "contradictory"] = "none"  # captions of the held-out faces, Table VII


@dataclass(frozen=True)
class Sample(SampleFlags):
    """Restore faces with trained weights, with a caption or without."""
    output: str = "results/pref_restore"   # folder for restored_faces/, cmp/ and args.json
    checkpoint: str = "runs/pref_restore"  # output folder of a training run, or the authors' folder or hub id
    caption: str = ""                      # one caption for all faces
    captions: str = ""                     # JSON: {"file": text} or [{"image": , "caption": }]
    sana: str = ""                         # for the authors' checkpoint: diffusers folder with configs and the VAE
    ta_tok: str = ""                       # for a checkpoint without TA-Tok: its file
    lora: str = ""                         # folder of a preference LoRA in peft's layout
    policy: typing.Literal["current", "base"] = "current"  # after stage 2, or the Stage 1 below it
    num_inference_steps: int = 0           # solver steps (0: as trained)
    solver: typing.Literal["", "euler", "dpm"] = ""  # (default: as trained)
    guidance_scale: float = 0.0            # 1 is no guidance (0: as trained)
    ar: typing.Literal["", "sample", "greedy"] = ""  # how visual words are chosen (default: as trained)
    top_p: float = 0.95                    # with --ar sample
    top_k: int = 1200                      # with --ar sample (0: all)
    temperature: float = 1.0               # with --ar sample


@dataclass(frozen=True)
class Ablate(Train):
    """Rerun the paper's tables at toy size."""
    output: str = "runs/pref_restore_ablate"  # folder for rows.json and the shared networks
    table: typing.Literal["all", "text", "reward", "staging", "consistency", "grpo"] = "all"  # VII VIII IX X, Figure 6
    rows: tuple[str, ...] = ()             # only these rows (default: all)
    seeds: int = 1                         # repetitions with other seeds
    consistency_seeds: int = 0             # restorations of each face; the rows of Table X have 8
    tokenizer_steps: int = 400             # shared by the rows of a seed
    prior_steps: int = 300                 # as tokenizer_steps
    semantic_steps: int = 150              # as tokenizer_steps
    texture_steps: int = 250               # rows that change stage 1.2 take 3 CPU minutes
    joint_steps: int = 400                 # as many as stages 1.1 and 1.2 together, section V-F
    ar: typing.Literal["sample", "greedy"] = "greedy"  # DIFFERS: rows differ in training alone; `seeds and words` draw
    preference_steps: int = 20             # rows that change stage 2 take 3 CPU minutes
    validation_faces: int = 128            # held-out faces restored and measured per row


PAPER = dict(
    image_size=512, batch_size=8, gradient_accumulation_steps=2, degradation="pref_restore", mixed_precision="bf16",
    num_workers=8, optimizer="adamw", log_steps=50, checkpointing_steps=2000, bank=0,
    ema_decay=0.0,  # UNSTATED: the authors' code averages no weights in stage 1; for stage 2 see policy_ema_decay
    gradient_checkpointing=True,
    pretrained="BLIP3o/BLIP3o-NEXT-SFT-3B",  # DIFFERS: its Qwen3 is the 1.7B, the paper says 0.6B
    sana="Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    semantic_steps=50_000, texture_steps=50_000, joint_steps=100_000,  # section V-F, Table IX. UNSTATED for Table II's
    semantic_learning_rate=1e-4, texture_learning_rate=2e-5, learning_rate=3e-4, own_answers=0.0,
    preference_steps=300,  # UNSTATED: the authors' code runs until it is stopped
    # UNSTATED, authors' code: all from here to the end (grpo_clip: Flow-GRPO's)
    context=2048, joint_learning_rate=2e-5, min_learning_rate=1e-5, updates_per_epoch=1, rank=32, lora_alpha=64.0,
    groups=6, group_size=24,  # 48 groups over 8 GPUs
    rollout_batch=9, rollout_steps=30, timestep_fraction=0.99, adv_clip=5.0, kl_weight=1e-4, grpo_clip=1e-4,
    rewards="real", hps_weight=1.0, clip_weight=1.0, pick_weight=1.0, identity_weight=0.5, lpips_weight=0.5,
    lmd_weight=0.5, num_inference_steps=30, solver="euler", guidance_scale=2.0)

# What the released networks are, for counting and for loading checkpoints that carry no sizes.
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

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"                     # 11 tokens
USER = "<|im_start|>user\n"                                                                 # 3
END = "<|im_end|>\n"                                                                        # 2
ASSISTANT = "<|im_start|>assistant\n"                                                       # 3
ASK = "\nPlease reconstruct the given image."                                               # 7
ASK_CAPTION = "\nPlease reconstruct the given image based on the image content:"
COPY = ("\nThis is a side mission. Please complete the auxiliary reconstruction task by duplicating "
        "the given high-definition image.")
# Text to image, for the toy prior alone. DIFFERS: the authors' dataset code says "Please generate image based on the
# following caption: ...".
DRAW = "Please generate an image:"


class ToyTokenizer:
    """Words and marks of the chat template and of the toy captions, called as the tokenizers of transformers are."""
    PIECES = re.compile(r"<\|\w+\|>|\n|[a-z]+|[.:]")
    pad_token_id = 0

    def __init__(self):
        text = " ".join([SYSTEM, USER, END, ASSISTANT, ASK, ASK_CAPTION, COPY, DRAW, *WordTokenizer().words[2:]])
        self.words = ["<pad>", "<unk>"] + sorted(set(self.PIECES.findall(text.lower())))
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def encode(self, text: str, add_special_tokens: bool = False) -> list:
        return [self.ids.get(word, 1) for word in self.PIECES.findall(text.lower())]


class Vocabulary:
    """A text tokenizer and, behind its `first` words, <im_start> <im_end> <S0> <S1> <S2> and the visual words <I0> ..

    The order of adding fixes the ids: with Qwen3's 151 669 words the first visual word is 151 674, the size 217 210.
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
    ids: torch.Tensor      # (B, L) words
    mask: torch.Tensor     # (B, L) bool, False on padding
    labels: torch.Tensor   # (B, L) ids, -100 where no loss is wanted
    start: torch.Tensor    # (B,) place of <S0>: the answer's states are start .. start + N


def prompt_pieces(vocab, source, caption: str, task: str, room: int) -> tuple:
    """(words before the image, words after it) of the user's turn; a caption longer than `room` words is cut."""
    said = vocab.encode(" " + caption.strip())[:room] if caption.strip() else []
    if source is None:
        return vocab.encode(SYSTEM + USER + DRAW) + said, vocab.encode(END + ASSISTANT)
    ask = COPY if task == "copy" else ASK_CAPTION if said else ASK
    said = [] if task == "copy" else said                          # the side mission overrides the caption
    return vocab.encode(SYSTEM + USER), vocab.encode(ask) + said + vocab.encode(END + ASSISTANT)


def caption_room(vocab, count: int, context: int) -> int:
    """Words a caption may have beside two images of `count` tokens. Raises UserError if not even the images fit."""
    fixed = len(vocab.encode(SYSTEM + USER + END + ASSISTANT + END)) + 3 + 2 * count
    ask, side_mission = len(vocab.encode(ASK_CAPTION)), len(vocab.encode(COPY))
    longest = fixed + max(ask, side_mission)
    if longest > context:
        raise UserError(f"--context {context}: too short, the prompt and two images of {count} tokens need {longest}")
    return context - fixed - ask


def build_sequence(vocab, source, captions, answer=None, tasks=None, context=2048, count=None, ce_on_text=True):
    """The exact chat layout; source: B rows of N visual words (or None: text to image), answer (B, N) or None.

    system | user: [N words of the degraded face] request (caption) | assistant: <im_start> <S0> [N words] <im_end> end.
    With an answer the rows are padded on the right, for training. Without, they end after <S0> and are padded on the
    LEFT, so that all rows of a batch go on together, whatever their captions. Labels leave out padding and the degraded
    face's words; with ce_on_text False also the prompt (the authors' code learns it, their masking line is commented
    out). An over-long caption is cut to what fits `context`.
    """
    rows, labels, starts = [], [], []
    device = answer.device if answer is not None else next((s.device for s in source if s is not None), None)
    source, answer = (words.cpu() if torch.is_tensor(words) else words for words in (source, answer))
    count = count or (len(answer[0]) if answer is not None else len(source[0]))
    room = caption_room(vocab, count, context)
    for b, caption in enumerate(captions):
        task = tasks[b] if tasks is not None else "restore"
        before, after = prompt_pieces(vocab, source[b], caption, task, room)
        image = [] if source[b] is None else (source[b] + vocab.first_code).tolist()
        prompt = before + image + after + [vocab.image_start]
        row = prompt + [vocab.scale]
        label = before + [-100] * len(image) + after + [vocab.image_start, vocab.scale]
        if not ce_on_text:
            label = [-100] * len(label)
        if answer is not None:
            words = (answer[b] + vocab.first_code).tolist() + [vocab.image_end]
            closing = vocab.encode(END)
            row, label = row + words + closing, label + words + (closing if ce_on_text else [-100] * len(closing))
        rows.append(row), labels.append(label), starts.append(len(prompt))
    longest = max(map(len, rows))
    left = [longest - len(row) if answer is None else 0 for row in rows]
    fill = lambda row, value, shift: [value] * shift + row + [value] * (longest - len(row) - shift)
    table = lambda items, value: torch.tensor([fill(i, value, s) for i, s in zip(items, left)], device=device)
    return Sequence(table(rows, vocab.pad), table([[True] * len(r) for r in rows], False), table(labels, -100),
                    torch.tensor(starts, device=device) + torch.tensor(left, device=device))


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

    def nearest(self, z, table):  # (..., d), (K, d) -> (...) ids
        if self.l2_normalized:
            return (z @ table.T).argmax(-1)
        return (table.square().sum(-1) - 2 * z @ table.T).argmin(-1)     # |z|^2 does not change which is nearest

    def forward(self, z):
        z, table = F.normalize(z, dim=-1) if self.l2_normalized else z, self.codebook()
        ids = self.nearest(z, table)
        code = table[ids]
        loss = (code - z.detach()).square().mean() + self.commitment * (code.detach() - z).square().mean()
        return z + (code - z).detach(), ids, loss


class TATok(nn.Module):
    """Text-aligned tokenizer: SigLIP2 features before the last layer, a bottleneck, SimVQ. Frozen outside `tokenizer`.

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
        quantiser = self.bottleneck["regularizer"]
        with torch.autocast(images.device.type, enabled=False):    # the same words in every precision
            z = self.features(images.float())
            return quantiser.nearest(F.normalize(z, dim=-1) if quantiser.l2_normalized else z, quantiser.codebook())


class TokenDecoder(nn.Module):
    """Toy only, not kept: what makes visual words mean something. From N codes to a small picture and to the reader's
    last features, from which identity and attributes are read linearly; TA-Tok likewise rebuilds SigLIP2's."""

    def __init__(self, width: int, side: int, features: int, pixels: int = 32):
        super().__init__()
        self.side, self.pixels = side, pixels
        self.position = nn.Parameter(0.02 * torch.randn(side * side, width))
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True,
                                                                 norm_first=True) for _ in range(2)])
        self.picture, self.features = nn.Linear(width, 3 * (pixels // side) ** 2), nn.Linear(width, features)

    def forward(self, code):  # (B, N, width) -> (B, 3, pixels, pixels), (B, N, features)
        h = self.layers(code + self.position)
        return F.fold(self.picture(h).mT, self.pixels, self.pixels // self.side, stride=self.pixels // self.side), \
            self.features(h)


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
    out = shares.cumsum(-1) - shares >= top_p                      # mass before a word
    out[:, 0] = False
    shares = shares.masked_fill(out, 0)
    draw = torch.multinomial(shares.cpu(), 1, generator=generator).to(order.device)
    return order.gather(1, draw)[:, 0]


class SemanticIntegrator(nn.Module):
    """Qwen3 over text and visual words; its last hidden states at the answer become SANA's condition.

    [Eq. 7] p(S | x_LQ, T) = prod_i p(s_i | s_<i, F_v, F_t). DIFFERS: the paper calls F_v a continuous projection of
    SigLIP2; the authors' code, and we, look the *discrete* words of the degraded face up in the embedding table.
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
        """(V, H) output words: the embedding itself where it is tied."""
        return self.lm_head.weight if hasattr(self, "lm_head") else self.llm.embed_tokens.weight

    def forward(self, sequence: Sequence):
        """-> (B, L, H), after the last RMSNorm. Positions count from the first real token of a row."""
        place = (sequence.mask.cumsum(1) - 1).clamp(min=0)
        return self.llm(input_ids=sequence.ids, attention_mask=sequence.mask.long(), position_ids=place,
                        use_cache=False).last_hidden_state

    @torch.no_grad()
    def generate(self, sequence: Sequence, vocab, count: int, **choice):
        """Exactly `count` visual words after the prompts, and the N + 1 states at <S0> and at each word.

        Logits are taken over the visual words alone, so nothing can end early. DIFFERS: the authors generate freely and
        then run the whole sequence once more; with a cache the very same states are already there.
        """
        from transformers import DynamicCache
        cache, ids, mask, states, tokens = DynamicCache(), sequence.ids, sequence.mask.long(), [], []
        place = (mask.cumsum(1) - 1).clamp(min=0)
        words = self.head[vocab.first_code:vocab.first_code + vocab.codes]
        # renamed by transformers 5; old releases know the old name alone, 5.40 will know the new one alone
        name = "cache" if "cache" in inspect.signature(self.llm.forward).parameters else "past_key_values"
        for i in range(count + 1):
            hidden = self.llm(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True,
                              **{name: cache}).last_hidden_state[:, -1]
            states.append(hidden)
            if i < count:
                tokens.append(pick_token(F.linear(hidden, words.to(hidden.dtype)), **choice))
                ids, place = tokens[-1][:, None] + vocab.first_code, place[:, -1:] + 1
                mask = F.pad(mask, (0, 1), value=1)
        return torch.stack(tokens, 1), torch.stack(states, 1)


def answer_states(states, start, count: int):
    """(B, L, H) -> (B, N + 1, H): the states at <S0> and the N visual words, from `start` on.

    DIFFERS: the authors' guard compares the wrong dimension, so training takes the last 730 places of the padded batch
    (shifted by three, and padding for shorter rows) while inference takes these.
    """
    place = start[:, None] + torch.arange(count + 1, device=start.device)
    return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))


# ------------------------------------------------------------------------------------------------ model: the whole


class PrefRestore(nn.Module):
    """All networks. `uses`: which tokens condition the flow, ("semantic",) after 1.1, both after 1.2."""

    def __init__(self, sizes: dict):
        super().__init__()
        from diffusers import AutoencoderDC, SanaTransformer2DModel
        self.sana, self.vae = SanaTransformer2DModel(**sizes["sana"]), AutoencoderDC(**sizes["vae"])
        self.tatok = TATok(**sizes["tatok"])
        out = sizes["sana"]["caption_channels"]
        self.integrator = SemanticIntegrator(sizes["llm"], out)
        inner = sizes["sana"]["num_attention_heads"] * sizes["sana"]["attention_head_dim"]
        self.texture = connector(inner, out)                                             # the authors' vae_connector
        self.lq_encoder = copy.deepcopy(self.vae.encoder)                                # E_psi; vae.encoder is E_0
        self.register_buffer("latent_scale", torch.tensor(float(sizes["vae"].get("scaling_factor", 1.0))))
        self.uses = ("semantic", "texture")

    @torch.no_grad()
    def encode(self, hq):
        """x0 = scale E_0(x_HQ): (B, 3, S, S) -> (B, c, h, w)."""
        with not_half(hq):
            return self.vae.encoder(hq) * self.latent_scale

    def encode_lq(self, lq):
        """scale E_psi(x_LQ)."""
        with not_half(lq):
            return self.lq_encoder(lq) * self.latent_scale

    def decode(self, z):
        """(B, c, h, w) -> (B, 3, S, S), clipped."""
        with not_half(z):
            return self.vae.decoder(z / self.latent_scale).float().clamp(-1, 1)

    def condition(self, states=None, z_lq=None):
        """C = [semantic tokens ; texture tokens] along the sequence; texture passes SANA's frozen patch embedding."""
        parts = []
        if "semantic" in self.uses:
            parts.append(self.integrator.connector(states))
        if "texture" in self.uses:
            parts.append(self.texture(self.sana.patch_embed(z_lq)))
        return torch.cat(parts, 1)

    def velocity(self, x, sigma, cond):
        """(B, c, h, w), (B,), (B, L, D) -> (B, c, h, w). SANA's clock runs to 1000."""
        return self.sana(x, encoder_hidden_states=cond, timestep=1000 * sigma, return_dict=False)[0].float()


# Which parameters a stage trains, by the start of their names. Everything else is frozen, and no gradient reaches it.
TRAINED = {
    "tokenizer": ("vae.", "tatok."),
    "prior": ("integrator.", "sana."),
    "1.1": ("integrator.", "sana.caption_"),
    "1.2": ("sana.transformer_blocks.", "texture.", "lq_encoder."),
    "joint": ("integrator.", "sana.caption_", "sana.transformer_blocks.", "texture.", "lq_encoder."),
    "2": (),  # only the `current` LoRA
}


def route(model, stage: str, cfg) -> list:
    """Freeze all but what the stage trains; returns those parameters. SimVQ's random table never learns."""
    chosen = TRAINED[stage]
    if not cfg.train_caption_projection:
        chosen = tuple(name for name in chosen if name != "sana.caption_")
    for name, parameter in model.named_parameters():
        wanted = name.startswith(chosen) if chosen else ".lora_" in name
        tied = cfg.tie_connector_norm and name == "texture.3.weight"
        parameter.requires_grad_(wanted and not tied and "regularizer.embedding.weight" not in name)
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------ model: policies


class PolicyLinear(nn.Module):
    """One frozen linear layer and two low-rank changes: `current` is trained, `old` lags and draws the roll-outs.

    active "current", "old" or "base": W x + (alpha / rank) B A x, or W x, which is Stage 1 bit for bit. `old` is held
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
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = policy
    try:
        yield
    finally:
        for layer, was in zip(layers, before):
            layer.active = was


@torch.no_grad()
def update_old(sana, decay: float) -> None:
    """theta_old <- decay theta_old + (1 - decay) theta."""
    for layer in policy_layers(sana).values():
        layer.old_A.lerp_(layer.lora_A, 1 - decay)
        layer.old_B.lerp_(layer.lora_B, 1 - decay)


def save_peft(sana, folder) -> None:
    """adapter_model.safetensors + adapter_config.json, as peft writes and the authors' release has them."""
    state, layers = {}, policy_layers(sana)
    for name, layer in layers.items():
        for part in "AB":
            weight = getattr(layer, f"lora_{part}").detach().cpu().contiguous()
            state[f"base_model.model.{name}.lora_{part}.weight"] = weight
    some = next(iter(layers.values()))
    rank = len(some.lora_A)
    with whole_file(Path(folder) / "adapter_model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(Path(folder) / "adapter_config.json",
               dict(peft_type="LORA", r=rank, lora_alpha=some.scale.item() * rank, lora_dropout=0.0, bias="none",
                    target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"))


def load_peft(sana, where: str) -> None:
    """Put a preference LoRA in as the current and the old policy. UserError where it does not fit."""
    folder = find_checkpoint(where, "lora")
    folder = folder / "lora" if (folder / "lora").is_dir() else folder
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        special = [name for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if config.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--lora {where}: no readable adapter_config.json; give a folder that peft has saved") from None
    if special:
        raise UserError(f"--lora {where}: made with {special[0]}, which is not supported here")
    state = read_weights(folder / "adapter_model.safetensors")
    if any(len(t) != rank for name, t in state.items() if name.endswith("lora_A.weight")):
        raise UserError(f"--lora {where}: its adapter_config.json says rank {rank}, its weights have another")
    if not policy_layers(sana):
        add_policies(sana, rank, alpha)
    wanted = {f"base_model.model.{name}.lora_{part}.weight" for name in policy_layers(sana) for part in "AB"}
    if extra := set(state) - wanted:
        raise UserError(f"--lora {where}: {len(extra)} unknown weights, e.g. {min(extra)}")
    for name, layer in policy_layers(sana).items():
        layer.scale.fill_(alpha / rank)
        for part in "AB":
            key = f"base_model.model.{name}.lora_{part}.weight"
            own = getattr(layer, f"lora_{part}")
            if key not in state or state[key].shape != own.shape:
                raise UserError(f"--lora {where}: {key} is missing or of another size; was it made for another SANA?")
            own.data.copy_(state[key])
            getattr(layer, f"old_{part}").copy_(state[key])


# ------------------------------------------------------------------------------------------------ losses: stage 1


def token_loss(states, head, labels, chunk: int = 2048):
    """Cross-entropy of the next word, mean over labels that are not -100 [Eq. 7, first term of Eq. 9].

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


# ------------------------------------------------------------------------------------------------ losses: stage 2


def total_reward(scores: dict, weights: dict):
    """R = sum_k w_k R_k [Eq. 11]: {name: (B,)}, {name: float} -> (B,). UserError where a reward is not finite."""
    for name, value in scores.items():
        if not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise UserError(f"reward {name} is not finite for {bad} of {len(value)} pictures; nothing was saved over. "
                            f"Set --{name}_weight 0, or look at its network")
    return sum(weights[name] * value for name, value in scores.items())


def optimality(rewards, group, scale: float = 5.0, eps: float = 1e-4):
    """r = 1/2 + 1/2 clip[(R - mean of its group) / Z, -1, 1], Z = scale (std over all + eps) -> (B,) [Eq. 12].

    rewards (B,), group (B,) int: which roll-outs belong to one degraded face. Equal rewards give 1/2.
    UNSTATED: the paper says Z is a scaling factor; 5 standard deviations of the whole batch are the authors' code.
    """
    number = group.unique(return_inverse=True)[1]
    count = torch.zeros(int(number.max()) + 1, dtype=rewards.dtype, device=rewards.device)
    total = count.index_add(0, number, rewards) / count.index_add(0, number, torch.ones_like(rewards))
    advantage = (rewards - total[number]) / (rewards.std(unbiased=False) + eps)
    return (0.5 + 0.5 * advantage / scale).clamp(0, 1)


def implicit_velocities(v, v_old, beta: float):
    """v+ = (1 - beta) v_old + beta v [Eq. 13], v- = (1 + beta) v_old - beta v [Eq. 14]: v- mirrors v+ at v_old."""
    return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v


def nft_loss(v, v_old, x_t, x0, sigma, r, beta, v_ref=None, kl_weight=0.0, adv_clip=5.0, form="x0"):
    """L = E[ r || v+ - (eps - x0) ||^2 + (1 - r) || v- - (eps - x0) ||^2 ]  [Eq. 4, 15] + kl_weight || v - v_ref ||^2.

    v, v_old, x_t, x0 (B, c, h, w); sigma, r (B,). form "velocity" is the printed loss. DIFFERS: "x0" is the authors'
    code: the same errors as clean latents, each divided by its own mean size (no gradient through that), times
    adv_clip / beta, so that at v = v_old the gradient is that of advantage-weighted flow matching: 5 and 1 / beta
    cancel against the 1 / 10 of Eq. 12. The value there does not depend on r, the gradient does.
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
    if kind == 0:
        return 0.0
    if kind == 1:
        return min(0.001 * step, 0.5)
    if kind == 2:
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    raise ValueError(f"old_policy_decay: kind must be 0, 1 or 2, not {kind}")


def grpo_loss(log_prob, old_log_prob, advantage, clip: float):
    """- E min( ratio A, clip(ratio, 1 - clip, 1 + clip) A ), ratio = exp(log_prob - old_log_prob) [Flow-GRPO].

    log_prob, old_log_prob, advantage (B,) -> scalar.
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


@torch.no_grad()
def read_face(model, vocab, cfg, lq, captions, generator=None):
    """Degraded faces (B, 3, S, S) -> C: the language model writes the answer's words, E_psi reads the texture."""
    states = None
    if "semantic" in model.uses:
        tokens = model.tatok.encode(lq)
        sequence = build_sequence(vocab, tokens, captions, context=cfg.context)
        choice = dict(top_k=cfg.top_k, top_p=cfg.top_p, temperature=cfg.temperature) if cfg.ar == "sample" else {}
        states = model.integrator.generate(sequence, vocab, model.tatok.count, generator=generator, **choice)[1]
    return model.condition(states, model.encode_lq(lq) if "texture" in model.uses else None)


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


def noise_like(model, cfg, count: int, generator, shared: bool = False):
    """(count, c, h, w) standard normal on the model's device, from a CPU generator: the same on every machine."""
    noise = torch.randn((1 if shared else count), *latent_shape(model, cfg), generator=generator)
    return noise.expand(count, -1, -1, -1).to(model.latent_scale.device)


# ------------------------------------------------------------------------------------------------ rewards


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


def toy_rewards(*readers) -> dict:
    """FaceReader's stand-ins under the same calls: (images, reference, captions) -> (B,), images in [-1, 1].

    Each reward is the mean over the readers: one network alone is pleased sooner than the face gets better. A reader
    looks at images and reference once for all rewards: they are known by identity, so do not change them in place.
    """
    for reader in readers:
        reader.stages = functools.lru_cache(maxsize=2)(functools.partial(type(reader).stages, reader))

    def agreement(reader, x, captions):  # mean probability that what the caption says is so; 1/2 where it is silent
        wanted = torch.stack([caption_targets(c) for c in captions]).to(x.device)
        right = torch.where(wanted == 1, reader.probabilities(x), 1 - reader.probabilities(x))
        said = ~wanted.isnan()
        return torch.where(said.any(1), (right * said).sum(1) / said.sum(1).clamp(min=1), 0.5)

    rewards = dict(
        hps=lambda reader, x, reference, _: reader.quality(x),
        clip=lambda reader, x, reference, captions: agreement(reader, x, captions),
        pick=lambda reader, x, reference, captions: reader.quality(x) * agreement(reader, x, captions),
        identity=lambda reader, x, reference, _: metrics.identity_similarity(reader.embed(x), reader.embed(reference)),
        lpips=lambda reader, x, reference, _: -metrics.reader_lpips(reader, x, reference) / 2,
        lmd=lambda reader, x, reference, captions: landmark_reward(reader)(x, reference, captions))
    mean_of = lambda reward: lambda *given: sum(reward(reader, *given) for reader in readers) / len(readers)
    return {name: mean_of(reward) for name, reward in rewards.items()}


def landmark_reward(network):
    """1 / (1 + d / 20), d the mean distance of 98 points in pixels of a 512 px face; 0.01 where none is found."""
    def reward(x, reference, captions):
        d = metrics.landmark_distance(network.landmarks(x), network.landmarks(reference)) * 512 / x.shape[-1]
        return torch.where(d.isfinite(), 1 / (1 + d / 20), 0.01)
    return reward


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


# How each CLIP gets to its size [their own code]: tensors, by torchvision's default in CLIPScore; 8-bit pictures.
RESIZE = dict(
    hps=lambda x, side: F.interpolate(x, (side, side), mode="bicubic", antialias=True),
    clip=lambda x, side: F.interpolate(x, (side, side), mode="bilinear", antialias=True),
    pick=lambda x, side: torch.stack([from_pil(to_pil(face).resize((side, side), Image.BICUBIC)) for face in x]).to(x))


class ClipReward:
    """cos(text, image) x scale of a CLIPModel: CLIPScore (1), PickScore (exp(logit_scale) / 26), HPSv2.1 (1)."""
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, name: str, model, tokenizer, scale: float = 1.0):
        self.resize, self.tokenizer, self.scale = RESIZE[name], tokenizer, scale
        self.model = model.eval().requires_grad_(False)
        self.side, self.length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def __call__(self, images, reference, captions):
        x = self.resize(images, self.side) / 2 + 0.5
        x = (x - x.new_tensor(self.MEAN).view(3, 1, 1)) / x.new_tensor(self.STD).view(3, 1, 1)
        words = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.length,
                               return_tensors="pt").to(images.device)
        image = self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)
        text = self.model.text_projection(self.model.text_model(**words).pooler_output)
        return self.scale * F.cosine_similarity(image, text)


def real_reward(cfg, name: str, device):
    """One of the paper's reward networks from the files on the command line; nothing is fetched."""
    if name in ("hps", "clip", "pick"):
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    if name == "hps":
        model, state = CLIPModel(CLIPConfig(**HPS_CLIP)), convert_open_clip(read_weights(cfg.hps))
        load_strict(model, state, f"--hps {cfg.hps}")
        return ClipReward(name, model.to(device), from_folder(AutoTokenizer, cfg.clip, "clip"))
    if name in ("clip", "pick"):
        model = from_folder(CLIPModel, getattr(cfg, name), name).to(device)
        scale = model.logit_scale.exp().item() / 26 if name == "pick" else 1.0
        return ClipReward(name, model, from_folder(AutoTokenizer, cfg.clip, "clip"), scale)
    if name == "identity":
        network = metrics.load_weights(metrics.ArcFaceGray(), cfg.arcface).to(device)
        return lambda x, reference, captions: metrics.identity_similarity(network.embed(x), network.embed(reference))
    if name == "lpips":
        network = metrics.lpips_network("vgg", cfg.vgg).to(device)
        return lambda x, reference, captions: -network(x, reference).flatten()
    return landmark_reward(metrics.load_weights(metrics.FAN98(), cfg.fan).to(device))


REWARD_FILES = {"hps": ("hps", "clip"), "clip": ("clip",), "pick": ("pick", "clip"), "identity": ("arcface",),
                "lpips": (), "lmd": ("fan",)}                      # flags that each network needs


def reward_weights(cfg) -> dict:
    """{name: weight} of the rewards that count."""
    return {name: getattr(cfg, f"{name}_weight") for name in REWARD_FILES if getattr(cfg, f"{name}_weight")}


def check_rewards(cfg) -> None:
    """Groups of two or more, a weight that is not 0, a file for every network. Raises UserError."""
    weights = reward_weights(cfg)
    spoken = [name for name in ("hps", "clip", "pick") if name in weights]
    if cfg.rewards == "real" and cfg.data and spoken and not cfg.captions:
        raise UserError(f"reward {spoken[0]} compares faces with their captions: give --captions FILE, or leave it out "
                        f"with --{spoken[0]}_weight 0")
    if cfg.group_size < 2:
        raise UserError(f"--group_size {cfg.group_size}: a roll-out is judged against its group; give at least 2")
    if not weights:
        raise UserError("every reward weight is 0: give one of " + ", ".join(f"--{n}_weight" for n in REWARD_FILES))
    for name in weights if cfg.rewards == "real" else ():
        for flag in REWARD_FILES[name]:
            where, instead = getattr(cfg, flag), f"or leave it out with --{name}_weight 0"
            if not where:
                raise UserError(f"reward {name} needs --{flag} (--help names the file); {instead}")
            hub_id = flag in ("clip", "pick") and re.fullmatch(r"[\w.-]+/[\w.-]+", where)
            if not hub_id and not Path(where).exists():
                raise UserError(f"--{flag} {where}: no such file or folder; {instead}")
        if name == "lpips":
            metrics.lpips_file("vgg", cfg.vgg)


def build_rewards(cfg, device, readers: str = "ac") -> dict:
    """{name: callable (images, reference, captions) -> (B,)} for every weight that is not 0; toy ones by `readers`."""
    check_rewards(cfg)
    if cfg.rewards == "toy":
        reads = dict(clip="attributes", pick="attributes", identity="identity", lmd="landmarks")
        needs = {reads[name] for name in reward_weights(cfg) if name in reads}
        every = toy_rewards(*(metrics.load_reader(name, cfg.readers, sorted(needs)).to(device) for name in readers))
        return {name: every[name] for name in reward_weights(cfg)}
    return {name: real_reward(cfg, name, device) for name in reward_weights(cfg)}


@torch.no_grad()
def score(rewards: dict, images, reference, captions, size: int = 32) -> dict:
    """{name: (B,) float32}: images, reference (B, 3, S, S) in [-1, 1], of which `size` are looked at together."""
    pieces = [(images[i:i + size].float(), reference[i:i + size], captions[i:i + size])
              for i in range(0, len(images), size)]
    found = [{name: reward(*piece).float() for name, reward in rewards.items()} for piece in pieces]
    return {name: torch.cat([scores[name] for scores in found]) for name in rewards}


# ------------------------------------------------------------------------------------------------ networks, weights


def toy_sizes(cfg, vocab) -> dict:
    """Small networks of the very classes of the paper. DIFFERS: SANA gets sine positions, which stand in for what its
    3x3 convolutions learn in pre-training, and through the shared patch embedding the texture tokens get them too."""
    width, levels = 32 * cfg.sana_heads, len(cfg.vae_widths)
    blocks, layers = ("ResBlock",) * (levels - 1) + ("EfficientViTBlock",), (0, 1) + (2,) * (levels - 2)
    return dict(
        llm=dict(vocab_size=vocab.size, hidden_size=cfg.llm_width, intermediate_size=3 * cfg.llm_width,
                 num_hidden_layers=cfg.llm_layers, num_attention_heads=cfg.llm_width // 32,
                 num_key_value_heads=math.gcd(cfg.llm_width // 32, max(1, cfg.llm_width // 64)), head_dim=32,
                 tie_word_embeddings=True, max_position_embeddings=cfg.context),
        sana=dict(in_channels=cfg.latent_channels, out_channels=cfg.latent_channels, num_attention_heads=cfg.sana_heads,
                  attention_head_dim=32, num_layers=cfg.sana_layers, num_cross_attention_heads=cfg.sana_heads,
                  cross_attention_head_dim=32, cross_attention_dim=width, caption_channels=width, mlp_ratio=2.5,
                  sample_size=cfg.image_size // 2 ** (levels - 1), patch_size=1, qk_norm="rms_norm_across_heads",
                  interpolation_scale=1.0),
        vae=dict(latent_channels=cfg.latent_channels, attention_head_dim=32, encoder_block_types=blocks,
                 decoder_block_types=blocks, encoder_block_out_channels=cfg.vae_widths,
                 decoder_block_out_channels=cfg.vae_widths, encoder_layers_per_block=layers,
                 decoder_layers_per_block=layers, encoder_qkv_multiscales=((),) * levels,
                 decoder_qkv_multiscales=((),) * levels, upsample_block_type="interpolate",
                 downsample_block_type="conv"),
        tatok=dict(siglip=dict(hidden_size=cfg.tokenizer_width, intermediate_size=2 * cfg.tokenizer_width,
                               num_hidden_layers=4, num_attention_heads=cfg.tokenizer_width // 24,
                               image_size=cfg.image_size, patch_size=cfg.image_size // cfg.token_side,
                               vision_use_head=False), codes=cfg.codes, code_dim=cfg.code_dim))


def read_config(folder: Path, flag: str) -> dict:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"--{flag} {folder}: no readable config.json") from None


def tuples(value):
    """JSON's lists as tuples, all the way down."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def diffusers_sizes(folder: Path) -> tuple:
    """(sana, vae) keyword arguments from the configs of a diffusers folder."""
    return tuple({k: tuples(v) for k, v in read_config(folder / part, "sana").items() if k[0] != "_"}
                 for part in ("transformer", "vae"))


def text_tokenizer(where, flag: str = "checkpoint"):
    """The tokenizer of a folder; "" is the toy one."""
    from transformers import AutoTokenizer
    return from_folder(AutoTokenizer, str(where), flag) if where else ToyTokenizer()


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
        state = {name: t for name, t in content["sd"].items() if torch.is_tensor(t) and not name.startswith("teacher")}
        return state, plain(content.get("args"))
    except FileNotFoundError:
        raise UserError(f"--ta_tok {path}: no such file") from None
    except Exception as error:                                     # a damaged or hostile pickle can raise anything
        raise UserError(f"--ta_tok {path}: not TA-Tok's file, or reading it could run code ({type(error).__name__}); "
                        "wants model.sd and model.args, saved by torch.save") from None


def plain(value):
    """`Inert` objects as dictionaries of what they held, all the way down."""
    value = vars(value) if isinstance(value, Inert) else value
    return {key: plain(v) for key, v in value.items()} if isinstance(value, dict) else value


HEAD = 72  # channels of a SigLIP so400m head, the one size that weights do not show


def tatok_parts(state: dict, arguments: dict) -> tuple:
    """(sizes, weights) of TATok from its released names; sizes are read off the shapes."""
    state = {name.replace("encoder.vision_model.", "encoder."): t for name, t in state.items()}
    try:
        patch = state["encoder.embeddings.patch_embedding.weight"]
        places = state["encoder.embeddings.position_embedding.weight"]
        codes, code_dim = state["bottleneck.regularizer.embedding.weight"].shape
        inner = len(state["encoder.encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise UserError(f"TA-Tok: no {error.args[0]} among its weights; is it another tokenizer?") from None
    layers = 1 + max(int(m[1]) for m in (re.match(r"encoder\.encoder\.layers\.(\d+)", n) for n in state) if m)
    siglip = dict(SO400M, hidden_size=len(patch), intermediate_size=inner, num_hidden_layers=layers,
                  num_attention_heads=max(1, len(patch) // HEAD), patch_size=patch.shape[-1],
                  image_size=math.isqrt(len(places)) * patch.shape[-1])
    siglip["image_size"] = 384 if (siglip["patch_size"], len(places)) == (14, 729) else siglip["image_size"]
    for key in ("bottleneck", "args", "regularizer", "args", "l2_normalized"):
        arguments = arguments.get(key) if isinstance(arguments, dict) else None
    sizes = dict(siglip=siglip, codes=codes, code_dim=code_dim, l2_normalized=arguments is not False)
    with torch.device("meta"):
        wanted = TATok(**sizes).state_dict()
    return sizes, {name: t for name, t in state.items() if name in wanted}


def read_release(where: str) -> dict:
    """All tensors of a (sharded) released checkpoint, in memory once."""
    folder = find_checkpoint(where)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{where}: no .safetensors file in this folder")
    state: dict = {}
    for file in files:
        state |= read_weights(file)
    return state


def load_release(where: str, sana: str = "", ta_tok: str = "") -> tuple:
    """(model, vocab, finished stages, sizes) from the authors' layout: one Hugging Face model with every part inside.

    model.embed_tokens, layers, norm (and lm_head) Qwen3; model.sana; model.sana_vae, whose encoder is E_psi; fixed_vae,
    E_0 (absent: --sana's VAE, else sana_vae); model.diffusion_connector, model.vae_connector (absent before stage 1.2);
    model.vision_tower.vision_tower TA-Tok (absent: --ta_tok). Sizes of Qwen3 come from config.json, those of SANA and
    the VAE from --sana or, without it, are SANA-1.5's.
    """
    folder, state = find_checkpoint(where), read_release(where)
    config = read_config(folder, "checkpoint")
    if "image_start_tag_id" not in config or "model.embed_tokens.weight" not in state:
        raise UserError(f"--checkpoint {where}: no image_start_tag_id in config.json or no language model: neither one "
                        "of our runs nor BLIP3o-NEXT's layout")
    part = lambda prefix: {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    tower = part("model.vision_tower.vision_tower.")
    arguments = {}
    if ta_tok or not tower:
        if not ta_tok:
            raise UserError(f"{where}: holds no TA-Tok; give its file with --ta_tok")
        tower, arguments = read_ta_tok(ta_tok)
    tatok, tower = tatok_parts(tower, arguments)
    sana_sizes, vae_sizes = diffusers_sizes(find_checkpoint(sana, "sana")) if sana else (SANA15, DCAE)
    llm = {**QWEN3_17B, **qwen_sizes(config), "vocab_size": len(state["model.embed_tokens.weight"])}
    llm["tie_word_embeddings"] = "lm_head.weight" not in state or config.get("tie_word_embeddings", True)
    sizes = dict(llm=llm, sana=sana_sizes, vae=vae_sizes, tatok=tatok, first_word=config["image_start_tag_id"])
    model = PrefRestore(sizes)
    load_strict(model.integrator.llm, {n: t for n, t in part("model.").items()
                                       if n.startswith(("embed_tokens.", "layers.", "norm."))}, f"{where}, Qwen3")
    if not llm["tie_word_embeddings"]:
        model.integrator.lm_head.weight.data.copy_(state["lm_head.weight"])
    load_strict(model.integrator.connector, part("model.diffusion_connector."), f"{where}, diffusion_connector")
    load_strict(model.sana, part("model.sana."), f"{where}, sana")
    load_strict(model.tatok, tower, f"{ta_tok or where}, TA-Tok")
    load_vaes(model, part("model.sana_vae."), part("fixed_vae."), sana, where)
    texture = part("model.vae_connector.")
    finished = ["tokenizer", "prior"] + (["1.1", "1.2"] if texture else [])
    if texture:                                                    # a missing 3.weight is the tied one
        load_strict(model.texture, {"3.weight": state["model.diffusion_connector.3.weight"]} | texture,
                    f"{where}, vae_connector")
    model.uses = ("semantic", "texture") if texture else ("semantic",)
    vocab = Vocabulary(text_tokenizer(folder), tatok["codes"], config["image_start_tag_id"])
    if config.get("image_start_token_id", vocab.first_code) != vocab.first_code or llm["vocab_size"] < vocab.size:
        raise UserError(f"--checkpoint {where}: another layout, its visual words do not start five after "
                        f"image_start_tag_id or its {llm['vocab_size']} words are fewer than {vocab.size}")
    return model, vocab, finished, sizes


def load_vaes(model, tuned: dict, fixed: dict, sana: str, where) -> None:
    """E_psi and the decoder from the checkpoint's VAE; E_0 from its frozen copy, else SANA's folder, else the same."""
    original = fixed
    if not original and sana:
        from diffusers import AutoencoderDC
        original = from_folder(AutoencoderDC, sana, "sana", subfolder="vae").state_dict()
    tuned = tuned or original
    load_strict(model.vae, original or tuned, f"{where}, VAE")
    pick = lambda prefix: {n.removeprefix(prefix): t for n, t in tuned.items() if n.startswith(prefix)}
    load_strict(model.vae.decoder, pick("decoder."), f"{where}, sana_vae.decoder")
    load_strict(model.lq_encoder, pick("encoder."), f"{where}, sana_vae.encoder")


def qwen_sizes(config: dict) -> dict:
    """What of a config.json decides Qwen3's shape; transformers 4 wrote the base of its rotations as rope_theta."""
    rotation = {"rope_type": "default", "rope_theta": config.get("rope_theta", 1e6)}
    return {"rope_parameters": rotation} | {k: config[k] for k in QWEN3_06B if k in config}


def extend_embedding(table, first: int, size: int):
    """(V, H) -> (size, H): words from `first` on start as the mean of those before [BLIP3o-NEXT].

    The table may be longer than the tokenizer: Qwen3's is padded to 151 936 rows, which never stood for a word.
    """
    return torch.cat([table[:first], table[:first].mean(0, keepdim=True).expand(size - first, -1)])


def build(cfg) -> tuple:
    """(model, vocab, finished stages, sizes): fresh toy networks, or the released one of each flag that is given."""
    absent = [name for name in ("sana", "ta_tok", "llm") if not getattr(cfg, name)]
    if 0 < len(absent) < 3:
        raise UserError(f"--{absent[0]} is missing: --sana, --ta_tok and --llm go together, or none of them")
    tower = tatok_parts(*read_ta_tok(cfg.ta_tok)) if cfg.ta_tok else None
    vocab = Vocabulary(text_tokenizer(cfg.llm, "llm"), tower[0]["codes"] if tower else cfg.codes)
    sizes = dict(toy_sizes(cfg, vocab), first_word=vocab.image_start)
    if cfg.llm:
        config = read_config(find_checkpoint(cfg.llm, "llm"), "llm")
        sizes["llm"] = dict(qwen_sizes(config), vocab_size=vocab.size)
        sizes["llm"].setdefault("tie_word_embeddings", True)
    if cfg.sana:
        sizes["sana"], sizes["vae"] = diffusers_sizes(find_checkpoint(cfg.sana, "sana"))
    if tower:
        sizes["tatok"] = tower[0]
    model = PrefRestore(sizes)
    if cfg.sana:
        from diffusers import AutoencoderDC, SanaTransformer2DModel
        model.sana = from_folder(SanaTransformer2DModel, cfg.sana, "sana", subfolder="transformer")
        model.vae = from_folder(AutoencoderDC, cfg.sana, "sana", subfolder="vae")
        model.lq_encoder = copy.deepcopy(model.vae.encoder)
    if tower:
        load_strict(model.tatok, tower[1], f"--ta_tok {cfg.ta_tok}")
    if cfg.llm:
        from transformers import AutoModelForCausalLM
        source = from_folder(AutoModelForCausalLM, cfg.llm, "llm", dtype=torch.float32)
        state = source.model.state_dict()
        state["embed_tokens.weight"] = extend_embedding(state["embed_tokens.weight"], vocab.image_start, vocab.size)
        load_strict(model.integrator.llm, state, f"--llm {cfg.llm}")
        if hasattr(model.integrator, "lm_head"):
            head = extend_embedding(source.lm_head.weight.data, vocab.image_start, vocab.size)
            model.integrator.lm_head.weight.data.copy_(head)
    return model, vocab, ["tokenizer", "prior"] if cfg.sana else [], sizes  # released networks need no toy stages


def network_parts(model) -> dict:
    """{part: {name: tensor}}, what `save_model` stores."""
    parts = {name: module.state_dict() for name, module in model.named_children()}
    return parts | {"self": {"latent_scale": model.latent_scale}}


def load_parts(model, parts: dict, cfg, where) -> None:
    """The inverse of `network_parts`; LoRA layers are made where the weights have them."""
    lora = [t for n, t in parts.get("sana", {}).items() if n.endswith("lora_A")]
    if lora and not policy_layers(model.sana):
        add_policies(model.sana, len(lora[0]), cfg.lora_alpha)
    for name, module in model.named_children():
        load_strict(module, parts.get(name, {}), f"{where}, {name}")
    if "latent_scale" not in parts.get("self", {}):
        raise UserError(f"{where}: lacks latent_scale; train again")
    model.latent_scale.copy_(parts["self"]["latent_scale"])


def save_networks(folder, model, vocab, sizes: dict, cfg, finished: list) -> None:
    """model.safetensors, config.json, the tokenizer where it is not the toy one, and the LoRA in peft's layout."""
    words = Path(folder) / "tokenizer"
    if not isinstance(vocab.tokenizer, ToyTokenizer) and not words.exists():
        vocab.tokenizer.save_pretrained(str(words.with_name(".tokenizer")))
        words.with_name(".tokenizer").rename(words)                # whole or not there
    save_model(folder, network_parts(model), dict(
        method="pref_restore", train=dataclasses.asdict(cfg), sizes=sizes, finished=finished, uses=model.uses,
        toy_words=isinstance(vocab.tokenizer, ToyTokenizer)))
    if policy_layers(model.sana):
        save_peft(model.sana, Path(folder) / "lora")


def load_run(where: str) -> tuple:
    """(model, vocab, finished stages, sizes, Train configuration) of a `save_networks` folder."""
    config, parts = load_model(where, "pref_restore")
    folder = find_checkpoint(where)
    folder = folder.parent if folder.is_file() else folder
    cfg = saved_flags(Train, config, f"--checkpoint {where}")
    try:
        sizes = {part: {k: tuples(v) for k, v in values.items()} if isinstance(values, dict) else values
                 for part, values in config["sizes"].items()}
        finished, uses, toy_words = list(config["finished"]), tuple(config["uses"]), config["toy_words"]
        codes, first_word = sizes["tatok"]["codes"], sizes["first_word"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"--checkpoint {where}: config.json lacks what a training run writes; train again") from None
    model = PrefRestore(sizes)
    load_parts(model, parts, cfg, f"--checkpoint {where}")
    model.uses = uses
    vocab = Vocabulary(text_tokenizer("" if toy_words else folder / "tokenizer"), codes, first_word)
    return model, vocab, finished, sizes, cfg


# ------------------------------------------------------------------------------------------------ data


def read_captions(path: str) -> dict:
    """{name: caption} from {"file": text} or [{"image": path, "caption": text}]; {} for "". UserError.

    Names are paths as listed, and also without their folders where no two are alike then. See `caption_of`.
    """
    if not path:
        return {}
    try:
        content = json.loads(Path(path).read_text())
        if isinstance(content, list):
            content = {row["image"]: row["caption"] for row in content}
        if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"--captions {path}: no such file") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"--captions {path}: wants JSON of the form {{\"file.png\": \"caption\"}} or "
                        "[{\"image\": \"file.png\", \"caption\": \"...\"}]") from None
    count = Counter(Path(name).name for name in content)
    return {Path(name).name: text for name, text in content.items() if count[Path(name).name] == 1} | content


def caption_of(captions: dict, path) -> str:
    """The caption whose name is the longest end of the path, "anna/1.png" before "1.png"; "" if there is none."""
    ends = ("/".join(Path(path).parts[n:]) for n in range(len(Path(path).parts)))
    return next((captions[end] for end in ends if end in captions), "")


def match_captions(captions: dict, paths: list, file: str) -> None:
    """Say which pictures have no caption and which captions no picture; UserError if none fits."""
    bare = [path for path in paths if not caption_of(captions, path)]
    absent = sorted({Path(name).name for name in captions} - {path.name for path in paths})
    if captions and len(bare) == len(paths):
        raise UserError(f"--captions {file}: has no caption for any picture of the folder (e.g. {paths[0].name})")
    if captions and bare:
        print(f"--captions {file}: {len(bare)} of {len(paths)} pictures have none (e.g. {bare[0].name})", flush=True)
    if absent:
        print(f"--captions {file}: {len(absent)} of its pictures are not in the folder, left out (e.g. {absent[0]})",
              flush=True)


class CaptionedFaces(Faces):
    """Faces whose batches also carry `caption`, B strings: of the toy world's attributes, or of a JSON file."""

    def __init__(self, cfg):
        mirror = not cfg.captions                                  # a caption may say left or right
        super().__init__(cfg.data, cfg.image_size, cfg.validation_data, mirror=mirror)
        self.captions = read_captions(cfg.captions)
        match_captions(self.captions, self.files + self.held_out_files, cfg.captions)

    def told(self, batch):
        if "paths" in batch:
            return dict(batch, caption=[caption_of(self.captions, p) for p in batch["paths"]])
        return dict(batch, caption=[verbalise(a) for a in batch["attributes"].tolist()])

    def training(self, *where):
        return self.told(super().training(*where))

    def held_out(self, *which):
        return self.told(super().held_out(*which))


class Bank:
    """Clean faces with all that the frozen networks make of them, drawn once: hq as bytes, words, latents, captions."""

    @torch.no_grad()
    def __init__(self, cfg, run, faces, model):
        rows, self.caption = dict(hq=[], tokens=[], z_hq=[]), []
        for step in range(-(-cfg.bank // 64)):
            batch = faces.training(64, mix("bank", cfg.seed), step, run.rank, run.world)
            hq = batch["hq"].to(run.device)
            rows["hq"].append(((batch["hq"] + 1) * 127.5).round().byte())
            rows["tokens"].append(model.tatok.encode(hq).cpu())
            rows["z_hq"].append(model.encode(hq).cpu())
            self.caption += batch["caption"]
        self.rows = {name: torch.cat(values) for name, values in rows.items()}

    def training(self, batch_size, seed, step, rank=0, world=1):
        rng = torch.Generator().manual_seed(mix("bank", seed, step, rank))
        rows = torch.randint(len(self.caption), (batch_size,), generator=rng)
        seeds = torch.randint(2 ** 40, (batch_size,), generator=rng)
        found = {name: values[rows] for name, values in self.rows.items()}
        return dict(found, hq=found["hq"] / 127.5 - 1, caption=[self.caption[i] for i in rows.tolist()], seeds=seeds)


def batches(cfg, run, source, size: int | None = None, mixture: bool = True):
    """batch_at(k) for `Stage.steps`: hq, lq, caption, tasks. source: Faces or Bank. With `mixture` the identity task
    (input := clean face) and caption dropout of stages 1.1 and 1.2."""
    def at(k):
        batch = source.training(size or cfg.batch_size, cfg.seed, k, run.rank, run.world)
        rng = torch.Generator().manual_seed(mix("mixture", cfg.seed, k, run.rank))
        copied, told = torch.rand(2, len(batch["hq"]), generator=rng).unbind()
        lq = degrade(batch["hq"], DEGRADATIONS[cfg.degradation], batch["seeds"])
        captions, tasks = batch["caption"], ["restore"] * len(lq)
        if mixture:
            lq = torch.where((copied < cfg.identity_share).view(-1, 1, 1, 1), batch["hq"], lq)
            tasks = ["copy" if c < cfg.identity_share else "restore" for c in copied.tolist()]
            captions = [c if t < cfg.caption_share else "" for c, t in zip(captions, told.tolist())]
        return dict(batch, lq=lq, caption=captions, tasks=tasks)
    return at


# ------------------------------------------------------------------------------------------------ training: alignment


def cosine_lr(cfg, steps: int, peak: float):
    """Multiple of the peak: linear for a share of the steps, then a cosine down to the minimum."""
    warmup = max(1, round(cfg.warmup_ratio * steps))
    return warmup_cosine(max(1, steps - warmup), warmup, min(1.0, cfg.min_learning_rate / max(peak, 1e-12)),
                         1 / (warmup + 1))


def train_tokenizer(cfg, run, faces, model) -> None:
    """Toy stand-ins for DC-AE and TA-Tok, each trained to rebuild clean and degraded faces."""
    reader = metrics.load_reader("a", cfg.readers).to(run.device)
    side, width = cfg.token_side, cfg.tokenizer_width
    decoder = TokenDecoder(width, side, reader.identity.in_features // 16).to(run.device)
    parameters = route(model, "tokenizer", cfg) + list(decoder.parameters())
    steps = min(cfg.tokenizer_steps, cfg.max_train_steps)
    optimizer = make_optimizer(cfg, parameters, cfg.tokenizer_learning_rate)
    stage = Stage(run, "tokenizer", {"model": model, "decoder": decoder}, {"tokenizer": optimizer}, steps,
                  cosine_lr(cfg, steps, cfg.tokenizer_learning_rate))
    half = dataclasses.replace(cfg, identity_share=0.5)
    for _, batch in stage.steps(batches(half, run, faces, max(1, cfg.batch_size // 2))):
        x = batch["lq"]                                            # every other one is clean
        with run.autocast():
            z = model.vae.encoder(x)
            z = z + cfg.latent_noise * z.std() * torch.randn_like(z)
            rebuilt = model.vae.decoder(z).float()
            code, ids, commitment = model.tatok(x)
            small, features = decoder(code)
        seen, real = reader.stages(rebuilt), reader.stages(x)
        l1, perceptual = (rebuilt - x).abs().mean(), sum((a - b).abs().mean() for a, b in zip(seen, real))
        target = F.layer_norm(F.adaptive_avg_pool2d(real[4], side).flatten(2).mT, real[4].shape[1:2])   # (B, N, 8w)
        pixel = (small.float() - F.interpolate(x, small.shape[-2:], mode="area")).abs().mean()
        meaning = (features.float() - target).square().mean()
        used = torch.tensor(float(len(ids.unique())))
        stage.update(l1 + cfg.perceptual_weight * perceptual + pixel + meaning + commitment,
                     l1=l1, perceptual=perceptual, pixel=pixel, meaning=meaning, commitment=commitment, codes_used=used)
    take_average(model, stage)
    with torch.no_grad():                                          # latents of deviation 1, as the scaling factor does
        z = model.vae.encoder(faces.training(64, cfg.seed, 0)["hq"].to(run.device))
        model.latent_scale.copy_(1 / z.std())
    model.lq_encoder.load_state_dict(model.vae.encoder.state_dict())


def take_average(model, stage) -> None:
    """The averaged weights of a finished stage go into the model, which is then at rest."""
    model.load_state_dict(stage.ema["model"], strict=False)
    model.eval().requires_grad_(False)


def targets(model, batch) -> tuple:
    """(visual words (B, N), latents (B, c, h, w)) of the clean faces, from the bank where there is one."""
    if "tokens" in batch:
        return batch["tokens"], batch["z_hq"]
    return model.tatok.encode(batch["hq"]), model.encode(batch["hq"])


def teacher_forced(model, vocab, cfg, batch, source, answer) -> tuple:
    """(states of the whole sequence, sequence) with the true answer as input: what the decoder sees at inference is its
    own answer instead, a gap that the authors leave open."""
    sequence = build_sequence(vocab, source, batch["caption"], answer, batch["tasks"], cfg.context,
                              count=model.tatok.count, ce_on_text=cfg.ce_on_text)
    return model.integrator(sequence), sequence


def diffusion_loss(model, cfg, cond, z_hq):
    """L_diff at random noise levels, for a condition that is sometimes dropped."""
    cond = drop_condition(cond, cfg.condition_dropout)
    sigma = uniform_sigma(len(z_hq), z_hq.device)
    return flow_loss(lambda x, s: model.velocity(x, s, cond), z_hq, sigma, torch.randn_like(z_hq))


def semantic_loss(model, vocab, cfg, batch, source=None):
    """Stage 1.1: L = L_CE + lambda L_diff [Eq. 9], the condition being the semantic tokens alone. -> (loss, parts)"""
    answer, z_hq = targets(model, batch)
    source = model.tatok.encode(batch["lq"]) if source is None else source
    states, sequence = teacher_forced(model, vocab, cfg, batch, source, answer)
    ce = token_loss(states, model.integrator.head, sequence.labels)
    said = answer_states(states, sequence.start, model.tatok.count)
    diffusion = diffusion_loss(model, cfg, model.condition(said), z_hq)
    return ce + cfg.diffusion_weight * diffusion, dict(ce=ce, diffusion=diffusion)


def prior_loss(model, vocab, cfg, batch):
    """Toy prior: as stage 1.1 on clean faces, half of them to be copied, half to be drawn from their caption alone."""
    answer = targets(model, batch)[0]
    drawn = torch.rand(len(answer)).tolist()
    source = [None if d < 0.5 and c else words for d, c, words in zip(drawn, batch["caption"], answer.cpu())]
    return semantic_loss(model, vocab, cfg, dict(batch, tasks=["copy"] * len(answer)), source)


@torch.no_grad()
def write_answers(model, vocab, cfg, batch, source, answer):
    """A share of the rows of `answer` as the model itself writes them, word after word, always the likeliest word.

    DIFFERS: authors (and the paper preset) give the true words in training and leave a gap to inference.
    """
    own = (torch.rand(len(answer)) < cfg.own_answers).nonzero()[:, 0].tolist() if cfg.own_answers else []
    if not own:
        return answer
    prompt = build_sequence(vocab, source[own], [batch["caption"][i] for i in own], None,
                            [batch["tasks"][i] for i in own], cfg.context, model.tatok.count)
    answer = answer.clone()
    answer[own] = model.integrator.generate(prompt, vocab, model.tatok.count)[0]
    return answer


def texture_loss(model, vocab, cfg, batch, ce_weight: float = 0.0):
    """Stage 1.2: L = L_diff + L_vae [Eq. 10], both kinds of tokens. E_psi sees the degraded face and learns from both
    losses. With ce_weight (--joint) the language model learns at the same time. -> (loss, parts)"""
    answer, z_hq = targets(model, batch)
    said, parts, loss = None, {}, 0.0
    if "semantic" in model.uses:
        with torch.set_grad_enabled(ce_weight > 0):
            source = model.tatok.encode(batch["lq"])
            if not ce_weight:
                answer = write_answers(model, vocab, cfg, batch, source, answer)
            states, sequence = teacher_forced(model, vocab, cfg, batch, source, answer)
        said = answer_states(states, sequence.start, model.tatok.count)
        if ce_weight:
            parts["ce"] = token_loss(states, model.integrator.head, sequence.labels)
            loss = ce_weight * parts["ce"]
    z_lq = model.encode_lq(batch["lq"])
    parts["diffusion"] = diffusion_loss(model, cfg, model.condition(said, z_lq), z_hq)
    parts["vae"] = latent_consistency_loss(z_lq.float(), z_hq)
    return loss + cfg.diffusion_weight * parts["diffusion"] + cfg.vae_weight * parts["vae"], parts


def joint_loss(model, vocab, cfg, batch):
    """Table IX's joint optimisation: CE + diffusion + latent consistency at once, on the true words alone."""
    return texture_loss(model, vocab, cfg, batch, ce_weight=1.0)


# stage: (loss, field of its steps, field of its peak learning rate)
ALIGNMENT = {
    "prior": (prior_loss, "prior_steps", "prior_learning_rate"),
    "1.1": (semantic_loss, "semantic_steps", "semantic_learning_rate"),
    "1.2": (texture_loss, "texture_steps", "texture_learning_rate"),
    "joint": (joint_loss, "joint_steps", "joint_learning_rate"),
}


def conditions(cfg, stage: str) -> tuple:
    """Which tokens condition the flow from this stage on."""
    if stage in ("tokenizer", "prior", "1.1"):
        return ("semantic",)
    return ("semantic", "texture") if cfg.semantic else ("texture",)


def train_alignment(cfg, run, source, model, vocab, name: str) -> None:
    """Stages prior, 1.1, 1.2 and joint: the same loop, another loss and other frozen parts."""
    (loss_of, steps, rate), model.uses = ALIGNMENT[name], conditions(cfg, name)
    steps, rate = min(getattr(cfg, steps), cfg.max_train_steps), getattr(cfg, rate)
    if cfg.tie_connector_norm:
        model.texture[3].load_state_dict(model.integrator.connector[3].state_dict())
    parameters = route(model, name, cfg)
    optimizer = make_optimizer(cfg, parameters, rate, betas=(0.9, 0.999), weight_decay=0.0)
    stage = Stage(run, name, {"model": model}, {name: optimizer}, steps, cosine_lr(cfg, steps, rate))
    model.train()
    for _, batch in stage.steps(batches(cfg, run, source)):
        with run.autocast():
            loss, parts = loss_of(model, vocab, cfg, batch)
        stage.update(loss, **parts)
    take_average(model, stage)


# ------------------------------------------------------------------------------------------------ training: preference


def gathered(values, run) -> tuple:
    """((B,) of every process, one after another, place of this one's first), for statistics over the whole batch.

    Lengths may differ: faces that could not be read are left out.
    """
    parts = [values]
    if run.world > 1:
        parts = [None] * run.world
        dist.all_gather_object(parts, values.cpu())
    return torch.cat([part.to(values.device) for part in parts]), sum(map(len, parts[:run.rank]))


def learn(stage, shares, loss_of, logged: dict) -> None:
    """One optimiser step per share, one backward pass per piece of it: an epoch of roll-outs need not fit at once.

    A piece (rows, column) counts by its rows: the loss is the mean over all, however they are cut.
    """
    for pieces in shares:
        total, count = 0.0, sum(len(rows) for rows, _ in pieces)
        for number, (rows, column) in enumerate(pieces):
            loss = loss_of(rows, column) * len(rows) / count
            total = total + loss.detach()
            if number + 1 < len(pieces):
                stage.scaler.scale(loss / stage.accumulate).backward()
        stage.update(loss, loss=total, **logged)


def divide(columns: list, updates: int, rows: list) -> list:
    """Every (rows, column) once, in `updates` shares of columns."""
    updates = min(updates, len(columns))
    cuts = [len(columns) * i // updates for i in range(updates + 1)]
    return [[(r, c) for c in columns[a:b] for r in rows] for a, b in zip(cuts, cuts[1:])]


def nft_epoch(cfg, run, model, field, x0, r) -> tuple:
    """(shares, loss of a piece) for `learn`: every roll-out at several levels of its own grid, shuffled [Eq. 15]."""
    levels = torch.tensor(sigma_grid(cfg.rollout_steps)[:-1], device=x0.device)
    count = max(1, int(cfg.rollout_steps * cfg.timestep_fraction))
    order = torch.rand(len(x0), cfg.rollout_steps, device=x0.device).argsort(1)[:, :count]   # (N, T) levels of each

    def loss_of(rows, column):
        sigma, clean = levels[order[rows, column]], x0[rows]
        x_t = interpolate(clean, torch.randn_like(clean), sigma)
        v_ref = None
        with run.autocast():
            with torch.no_grad():
                if cfg.kl_weight or cfg.anchor == "stage1":
                    with acting(model.sana, "base"):
                        v_ref = field(rows)(x_t, sigma)
                with acting(model.sana, "old"):
                    v_old = v_ref if cfg.anchor == "stage1" else field(rows)(x_t, sigma)
            v = field(rows)(x_t, sigma)
        return nft_loss(v, v_old, x_t, clean, sigma, r[rows], cfg.nft_beta, v_ref if cfg.kl_weight else None,
                        cfg.kl_weight, cfg.adv_clip, cfg.nft_form)

    rows = torch.arange(len(x0), device=x0.device).split(cfg.rollout_batch)
    return divide(list(range(count)), cfg.updates_per_epoch, rows), loss_of


def grpo_epoch(cfg, run, field, path, log_probs, advantage) -> tuple:
    """The same for Flow-GRPO, on as many steps of each stored path as NFT uses noise levels."""
    sigmas = sigma_grid(cfg.rollout_steps)
    count = max(1, min(log_probs.shape[1], int(cfg.rollout_steps * cfg.timestep_fraction)))
    columns = torch.randperm(log_probs.shape[1])[:count].tolist()

    def loss_of(rows, i):
        x = path[i][rows]
        with run.autocast():
            v = field(rows)(x, x.new_full((len(x),), sigmas[i]))
        log_prob = flow_sde_step(v, x, sigmas[i], sigmas[i + 1], cfg.grpo_noise, path[i + 1][rows])[1]
        return grpo_loss(log_prob, log_probs[rows, i], advantage[rows], cfg.grpo_clip)

    rows = torch.arange(len(path[0]), device=path[0].device).split(cfg.rollout_batch)
    return divide(columns, cfg.updates_per_epoch, rows), loss_of


def roll_out(cfg, run, model, cond, policy: str) -> tuple:
    """(path of latents, log-probabilities or None), a row per row of cond, no guidance; NFT keeps the last latent.

    DIFFERS: SANA's clock gets 1000 sigma, where the authors' roll-outs cut it to an integer (the same at 10 steps).
    """
    sigmas, paths, log_probs = sigma_grid(cfg.rollout_steps), [], []
    first = torch.randn(len(cond), *latent_shape(model, cfg), device=cond.device)
    with acting(model.sana, policy), torch.no_grad(), run.autocast():
        for c, x in zip(cond.split(cfg.rollout_batch), first.split(cfg.rollout_batch)):
            field = lambda x, sigma, c=c: model.velocity(x, sigma, c)
            if cfg.algorithm == "nft":
                paths.append([dpm_solver_sample(field, x, sigmas)])
            else:
                path, log_prob = sde_sample(field, x, sigmas, cfg.grpo_noise)
                paths.append(path), log_probs.append(log_prob)
    path = [torch.cat(latents).float() for latents in zip(*paths)]
    return path, torch.cat(log_probs) if log_probs else None


def ready_policies(cfg, sana) -> None:
    """The preference LoRA, fresh or as it is there, old equal to current. UserError where it is of another size."""
    if not policy_layers(sana):
        add_policies(sana, cfg.rank, cfg.lora_alpha)
    some = next(iter(policy_layers(sana).values()))
    rank, alpha = len(some.lora_A), some.scale.item() * len(some.lora_A)
    if rank != cfg.rank or not math.isclose(alpha, cfg.lora_alpha, rel_tol=1e-5):
        raise UserError(f"--rank {cfg.rank}, --lora_alpha {cfg.lora_alpha:g}: the preference LoRA that is there has "
                        f"rank {rank} and alpha {alpha:g}; repeat those")
    update_old(sana, 0.0)                                          # a second phase begins where the first has ended


def train_preference(cfg, run, source, model, vocab) -> list:
    """Stage 2: fidelity-constrained preference optimisation of a LoRA on SANA. Returns the mean reward of every epoch.

    An epoch: condition once per face, K roll-outs that differ in their noise alone, rewards, r [Eq. 12], a few
    optimiser steps [Eq. 15], then the old policy follows. Captions go to the rewards only, not into the prompt (code).
    DIFFERS: faces are degraded on the way; the authors' stage 2 reads fixed pairs from a list.
    """
    rewards, weights = build_rewards(cfg, run.device), reward_weights(cfg)
    # DIFFERS from section IV-B1, as the authors' code: greedy words, so that roll-outs differ in their noise alone.
    reading = dataclasses.replace(cfg, ar="greedy")
    ready_policies(cfg, model.sana)
    optimizer = torch.optim.AdamW(route(model, "2", cfg), lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=cfg.preference_weight_decay)
    stage = Stage(run, "2", {"model": model}, {"2": optimizer}, min(cfg.preference_steps, cfg.max_train_steps))
    stage.ema_decay, curve, K = cfg.policy_ema_decay, [], cfg.group_size
    stage.log_steps, stage.checkpointing_steps = 1, max(1, cfg.checkpointing_epochs)  # an epoch is a step
    stage.accumulate = 1                                           # an epoch is one batch, already cut into pieces
    for epoch, batch in stage.steps(batches(cfg, run, source, cfg.groups, mixture=False)):
        with run.autocast():
            cond = read_face(model, vocab, reading, batch["lq"], [""] * len(batch["lq"])).float()
        cond, captions = cond.repeat_interleave(K, 0), [c for c in batch["caption"] for _ in range(K)]
        path, log_probs = roll_out(cfg, run, model, cond, "old" if cfg.algorithm == "nft" else "current")
        with torch.no_grad():
            images = torch.cat([model.decode(z) for z in path[-1].split(cfg.rollout_batch)])
        scores = score(rewards, images, batch["hq"].repeat_interleave(K, 0), captions, cfg.rollout_batch)
        reward = total_reward(scores, weights)
        # DIFFERS: the key of a group is the face, not its caption as in the authors' code, where equal captions merge.
        group = torch.arange(len(reward), device=reward.device) // K + run.rank * cfg.groups
        everyone, first = gathered(reward, run)
        r = optimality(everyone, gathered(group, run)[0], cfg.adv_clip)[first:first + len(reward)]
        field = lambda rows: lambda x, sigma: model.velocity(x, sigma, cond[rows])
        if cfg.algorithm == "nft":
            shares, loss_of = nft_epoch(cfg, run, model, field, path[-1], r)
        else:
            advantage = (2 * r - 1) * cfg.adv_clip
            shares, loss_of = grpo_epoch(cfg, run, field, path, log_probs, advantage)
        toy = "_toy" if cfg.rewards == "toy" else ""
        logged = {f"reward_{name}{toy}": value.mean() for name, value in scores.items()}
        logged |= {f"reward{toy}": reward.mean(), f"spread{toy}": reward.view(-1, K).std(1).mean()}  # spread over seeds
        learn(stage, shares, loss_of, logged)
        update_old(model.sana, old_policy_decay((epoch + 1) * len(shares), cfg.decay_kind))
        curve.append(reward.mean().item())
    take_average(model, stage)
    return curve


# ------------------------------------------------------------------------------------------------ training stages


def stages_of(cfg) -> list:
    """All stages of this configuration, in order."""
    middle = ["joint"] if cfg.joint else ["1.1", "1.2"] if cfg.semantic else ["1.2"]
    return ["tokenizer", "prior", *middle, "2"]


def check_sizes(cfg) -> None:
    """Sizes that cannot work together, in words, before anything is built. Raises UserError."""
    if cfg.rewards == "toy":
        refuse_unread(cfg, ("hps", "clip", "pick", "arcface", "fan", "vgg"), "rewards real")
    factor, widths, stages = 2 ** (len(cfg.vae_widths) - 1), cfg.vae_widths, stages_of(cfg)
    wrong = {
        f"--image_size {cfg.image_size}: must be a multiple of {factor}, the autoencoder's factor":
            cfg.image_size % factor,
        f"--token_side {cfg.token_side}: must divide the image size and 32":
            not cfg.token_side or cfg.image_size % cfg.token_side or 32 % cfg.token_side,
        f"--vae_widths {widths}: want two or more, each a multiple of the one before, the last of 32 and of "
        f"--latent_channels {cfg.latent_channels}":
            len(widths) < 2 or widths[-1] % cfg.latent_channels or widths[-1] % 32
            or any(b % a for a, b in zip(widths[1:], widths[2:])),
        f"--llm_width {cfg.llm_width}: must be a multiple of 32, a head": cfg.llm_width % 32 or not cfg.llm_width,
        f"--tokenizer_width {cfg.tokenizer_width}: must be a multiple of 24, a head": cfg.tokenizer_width % 24,
        f"--decay_kind {cfg.decay_kind}: must be 0, 1 or 2": cfg.decay_kind not in (0, 1, 2),
        f"--timestep_fraction {cfg.timestep_fraction}: must be at most 1": cfg.timestep_fraction > 1,
        "--algorithm grpo: needs --rollout_steps 2 or more": cfg.algorithm == "grpo" and cfg.rollout_steps < 2,
        "--consistency_seeds 1: a deviation needs two or more": cfg.consistency_seeds == 1,
        f"--lr_scheduler {cfg.lr_scheduler}: the stages have their own, a cosine to --min_learning_rate and a constant":
            cfg.lr_scheduler != Train().lr_scheduler,
        f"--lr_warmup_steps {cfg.lr_warmup_steps}: not read here; give --warmup_ratio":
            cfg.lr_warmup_steps != Train().lr_warmup_steps,
        f"--stage {cfg.stage}: with these --joint and --semantic the stages are {', '.join(stages)}":
            cfg.stage not in ["all", *stages],
    }
    for name in ("nft_beta", "adv_clip", "grpo_noise"):
        wrong[f"--{name} 0: must be more than 0"] = not getattr(cfg, name)
    for message, bad in wrong.items():
        if bad:
            raise UserError(message)


def start(cfg, wanted: list) -> tuple:
    """(model, vocab, finished, sizes) to begin with: what --output holds, else --pretrained, else fresh networks."""
    going_on = cfg.resume_from_checkpoint or cfg.stage != "all"
    if going_on and (Path(cfg.output) / "config.json").exists():
        *found, before = load_run(cfg.output)
        same_settings(cfg, before, ("image_size", "context"), cfg.output, "output")
        if cfg.pretrained and not cfg.resume_from_checkpoint:
            print(f"--pretrained {cfg.pretrained} is not read: {cfg.output} holds networks already", flush=True)
    elif cfg.pretrained:
        if cfg.llm:
            raise UserError(f"--llm {cfg.llm}: is not read with --pretrained {cfg.pretrained}, which brings its own; "
                            "leave one of them out (of the paper preset: --pretrained \"\")")
        found = load_run(cfg.pretrained)[:4] if is_run(find_checkpoint(cfg.pretrained, "pretrained")) else \
            load_release(cfg.pretrained, cfg.sana, cfg.ta_tok)
        found = (*found[:2], [name for name in found[2] if name != cfg.stage], found[3])  # a stage asked for is trained
    else:
        found = build(cfg)
    stages = stages_of(cfg)
    before = [s for s in stages[:stages.index(wanted[0])] if s not in found[2]]
    if before:
        raise UserError(f"--stage {cfg.stage} needs stage {before[0]}: train it first (--stage {before[0]}), or give a "
                        "finished run with --pretrained")
    after = [s for s in stages[stages.index(wanted[-1]) + 1:] if s in found[2]]
    if after and not cfg.resume_from_checkpoint:
        raise UserError(f"--stage {cfg.stage}: {cfg.output} is already past it (stage {after[-1]}); choose another "
                        "--output with --pretrained")
    return found


def recompute_activations(model) -> None:
    """Of SANA and Qwen3, in the backward pass: less memory, more time."""
    model.sana.enable_gradient_checkpointing()
    llm, renamed = model.integrator.llm, "activation_checkpointing_enable"  # transformers 6 drops the old name
    llm.activation_checkpointing_enable() if hasattr(llm, renamed) else llm.gradient_checkpointing_enable()


def run_stage(name, cfg, run, faces, bank, model, vocab) -> list:
    """One stage from its start (or from state.pt) to its end; returns the rewards of stage 2."""
    torch.manual_seed(mix("stage", name, cfg.seed))                # fresh layers do not depend on what ran before
    if name == "prior":                                            # it stands in for a release: one for all settings
        fields = ("caption_share", "identity_share", "condition_dropout", "ce_on_text", "diffusion_weight")
        cfg = dataclasses.replace(cfg, **{field: getattr(Train(), field) for field in fields})
    if name == "tokenizer":
        train_tokenizer(cfg, run, faces, model)
    elif name == "2":
        return train_preference(cfg, run, bank or faces, model, vocab)
    else:
        train_alignment(cfg, run, bank or faces, model, vocab, name)
    return []


def train(cfg: Train) -> None:
    """The stages asked for, in order: each is saved when it ends, and from 1.1 on measured on held-out faces."""
    check_sizes(cfg)
    wanted = stages_of(cfg) if cfg.stage == "all" else [cfg.stage]
    faces = CaptionedFaces(cfg)
    if "2" in wanted or cfg.rewards == "toy":                      # the toy rewards measure every stage
        check_rewards(cfg)                                         # a missing network should not come out after days
    if cfg.pretrained and Path(cfg.pretrained).resolve() == Path(cfg.output).resolve():
        raise UserError(f"--pretrained {cfg.pretrained} is --output itself; go on there with --stage NAME")
    run = Run(cfg, fresh=cfg.stage == "all" and not cfg.resume_from_checkpoint)
    torch.manual_seed(cfg.seed)
    model, vocab, finished, sizes = start(cfg, wanted)
    room = caption_room(vocab, model.tatok.count, cfg.context)
    run.start_log()
    cut = {text for text in faces.captions.values() if len(vocab.encode(" " + text)) > room}
    if cut:
        run.say(f"--captions {cfg.captions}: {len(cut)} captions are longer than the {room} words that fit --context "
                f"{cfg.context}; they are cut")
    model.to(run.device).eval().requires_grad_(False)
    if cfg.gradient_checkpointing:
        recompute_activations(model)
    if cfg.stage != "all" and not cfg.resume_from_checkpoint:
        run.former = wanted
    bank = None
    for name in wanted:
        if name in finished and (cfg.stage == "all" or cfg.resume_from_checkpoint):
            run.say(f"stage {name}: finished before, taken as it is")
            measured = name in ("tokenizer", "prior") or f"stage {name}" in measured_before(cfg.output)
            if run.main and name == finished[-1] and not measured:
                report(cfg, run, faces, model, vocab, name)        # it was stopped while measuring
            continue
        if cfg.bank and name != "tokenizer" and bank is None:
            bank = Bank(cfg, run, faces, model)
        run_stage(name, cfg, run, faces, bank, model, vocab)
        finished = [s for s in finished if s != name] + [name]
        if run.main:
            save_networks(cfg.output, model, vocab, sizes, cfg, finished)
            if name not in ("tokenizer", "prior"):
                report(cfg, run, faces, model, vocab, name)


# ------------------------------------------------------------------------------------------------ measuring


def restore_held_out(cfg, run, model, vocab, lq, captions, seed: int) -> torch.Tensor:
    """(N, 3, S, S) in [-1, 1] -> restored, on the CPU, in batches; noise and words follow from `seed`."""
    rng, found, size = torch.Generator().manual_seed(seed), [], at_once(cfg.image_size)
    for i in range(0, len(lq), size):
        x = lq[i:i + size].to(run.device)
        with run.autocast():
            cond = read_face(model, vocab, cfg, x, captions[i:i + size], rng)
            found.append(draw_face(model, cfg, cond, noise_like(model, cfg, len(x), rng)).cpu())
    return torch.cat(found)


def text_condition(kind: str, batch, lq, reader) -> list:
    """Captions of Table VII: none, the true one, the one read from the degraded face, its contradiction."""
    if kind == "none":
        return [""] * len(lq)
    if kind == "true":
        return batch["caption"]
    if "attributes" not in batch and kind == "contradictory":
        raise UserError("contradictory captions need the toy world's attributes; leave --data empty")
    scores = reader.probabilities(lq) if kind == "read" else 1 - batch["attributes"]
    return [verbalise(s) for s in scores.tolist()]


def rewards_given(cfg) -> bool:
    """Whether the rewards can be computed: always the toy's, real ones where their networks are given."""
    try:
        check_rewards(cfg)
    except UserError:
        return False
    return True


def reward_numbers(cfg, run, images, hq, captions) -> dict:
    """Mean and deviation of the total reward and each reward's mean. The toy's are read by reader_b, not by the ones
    which stage 2 optimises; real ones by the very networks it optimises, as in the paper."""
    rewards, toy = build_rewards(cfg, run.device, "b"), "_toy" if cfg.rewards == "toy" else ""
    scores = {name: value.cpu() for name, value in
              score(rewards, images.to(run.device), hq.to(run.device), captions).items()}
    total = total_reward(scores, reward_weights(cfg))
    numbers = {f"reward{toy}": total.mean().item(), f"reward_std{toy}": total.std(unbiased=False).item()}
    return numbers | {f"reward_{name}{toy}": value.mean().item() for name, value in scores.items()}


def consistency(cfg, run, model, vocab, found) -> dict:
    """Table X: deviation over seeds per face, then the mean over faces. The way words are chosen (--ar) is held fixed.

    Rows: the text-image rewards, distance of landmarks (pixels) and of identity (degrees), read by reader_b; the
    rewards by the real networks where they are given.
    """
    hq, lq, captions = (found[name][:cfg.consistency_faces] for name in ("hq", "lq", "captions"))
    reader = metrics.load_reader("b", cfg.readers).to(run.device)
    real = cfg.rewards == "real" and rewards_given(cfg)
    rewards, rows = build_rewards(cfg, run.device) if real else toy_rewards(reader), {}
    spoken = {name: rewards[name] for name in ("hps", "pick", "clip") if name in rewards}
    for seed in range(cfg.consistency_seeds):
        images = restore_held_out(cfg, run, model, vocab, lq, [""] * len(lq), mix("consistency", cfg.seed, seed))
        images, clean = images.to(run.device), hq.to(run.device)
        numbers = score(spoken, images, clean, captions)
        with torch.no_grad():
            numbers["lmd"] = metrics.landmark_distance(reader.landmarks(images), reader.landmarks(clean))
            numbers["deg"] = metrics.identity_angle(reader.embed(images), reader.embed(clean))
        for name, value in numbers.items():
            rows.setdefault(f"{name}_std{'' if real and name in spoken else '_toy'}", []).append(value)
    return {name: torch.stack(values).std(0).mean().item() for name, values in rows.items()}


def measure(cfg, run, faces, model, vocab) -> tuple:
    """(numbers, pictures) of held-out faces restored under one text condition."""
    batch, reader = faces.held_out(cfg.validation_faces), metrics.load_reader("b", cfg.readers).to(run.device)
    lq = degrade(batch["hq"], DEGRADATIONS[cfg.degradation], batch["seeds"])
    given = text_condition(cfg.text, batch, lq, metrics.load_reader("a", cfg.readers))
    restored = restore_held_out(cfg, run, model, vocab, lq, given, cfg.seed)
    numbers = metrics.toy_scores(restored, batch["hq"], reader)
    if rewards_given(cfg):
        numbers |= reward_numbers(cfg, run, restored, batch["hq"], batch["caption"])
    with torch.no_grad():
        pairs = zip(restored.to(run.device).split(32), batch["hq"].to(run.device).split(32))
        numbers["lpips_toy"] = torch.cat([metrics.reader_lpips(reader, x, y) for x, y in pairs]).mean().item()
        rebuilt = torch.cat([model.decode(model.encode(x.to(run.device))).cpu()
                             for x in batch["hq"].split(at_once(cfg.image_size))])
    return numbers, dict(lq=lq, restored=restored, hq=batch["hq"], reconstruction=rebuilt, captions=batch["caption"])


def measured_before(folder, protocol=None) -> dict:
    """The rows that earlier stages have left in metrics.json; with `protocol`, only if they saw the same faces."""
    try:
        found = json.loads((Path(folder) / "metrics.json").read_text())
        alike = protocol is None or all(found["protocol"][name] == protocol[name] for name in ("faces", "degradation"))
        return dict(found["rows"]) if alike else {}
    except (OSError, ValueError, KeyError, TypeError):             # none yet, or damaged
        return {}


def report(cfg, run, faces, model, vocab, name: str) -> dict:
    """Measure what a stage has left behind; add a row to metrics.json and a column to samples.png; print the table."""
    numbers, found = measure(cfg, run, faces, model, vocab)
    if cfg.consistency_seeds:
        numbers |= consistency(cfg, run, model, vocab, found)
    folder, reader = Path(cfg.output), metrics.load_reader("b", cfg.readers).to(run.device)
    path, pictures = folder / "metrics.json", folder / "columns.safetensors"
    protocol = metrics.toy_protocol(
        cfg.validation_data or cfg.data, cfg.degradation, len(found["hq"]), cfg.readers) | dict(
        text=f"captions in the prompt: {cfg.text}; rewards see the true one", words=f"chosen by --ar {cfg.ar}",
        rewards="read by FaceReader reader_b; stage 2 optimises reader_a's and reader_c's" if cfg.rewards == "toy" else
        "read by the networks given, which stage 2 optimises too" if rewards_given(cfg) else "no networks were given",
        std_toy=f"deviation over {cfg.consistency_seeds} seeds per face, mean over {cfg.consistency_faces} faces")
    earlier = measured_before(folder, protocol)
    rows = dict(lq=metrics.toy_scores(found["lq"], found["hq"], reader),
                reconstruction=metrics.toy_scores(found["reconstruction"], found["hq"], reader))
    rows |= {k: v for k, v in earlier.items() if k not in rows} | {f"stage {name}": numbers}
    columns = read_weights(pictures) if pictures.exists() else {}
    columns |= {"lq": found["lq"][:8], f"stage {name}": found["restored"][:8], "hq": found["hq"][:8]}
    with whole_file(pictures) as temporary:
        save_file({k: v.contiguous() for k, v in columns.items()}, temporary)
    order = ["lq", *(k for k in rows if k in columns and k != "lq"), "hq"]
    write_grid(folder / "samples.png", {k: columns[k] for k in order})
    write_curve(folder / "curves.png", read_curves(folder / "log.jsonl", (
        "l1", "meaning", "ce", "diffusion", "vae", "reward", "reward_toy")))
    extra = dict(faces=len(found["hq"]), **run.account(dict(model.named_children())))
    write_json(path, dict(rows=rows, **extra, protocol=protocol, **versions(run.device)))
    print_table({k: {n: v for n, v in row.items() if n in SHOWN["all"]} for k, row in rows.items()})
    run.say(f"stage {name} measured on {extra['faces']} held-out faces; {extra['seconds']:.0f} s, "
            f"{extra['peak_memory_gb']} GB at most; pictures and numbers in {folder}")
    return rows


# ------------------------------------------------------------------------------------------------ restore


def load_networks(cfg: Sample) -> tuple:
    """(model, vocab, Train configuration) of a run of ours or of the authors' checkpoint, with its LoRA if given."""
    if is_run(find_checkpoint(cfg.checkpoint)):
        if cfg.sana or cfg.ta_tok:
            raise UserError(f"--sana, --ta_tok: {cfg.checkpoint} brings its own; leave them out")
        model, vocab, finished, _, trained = load_run(cfg.checkpoint)
    else:
        model, vocab, finished, _ = load_release(cfg.checkpoint, cfg.sana, cfg.ta_tok)
        trained = Train(**PAPER)
    if not set(finished) & {"1.1", "1.2", "joint"}:
        raise UserError(f"--checkpoint {cfg.checkpoint}: only stages {', '.join(finished)} are trained; "
                        "go on with train")
    if cfg.lora:
        load_peft(model.sana, cfg.lora)
    if cfg.policy == "base" and not policy_layers(model.sana):
        raise UserError(f"--policy base: {cfg.checkpoint} has not been through stage 2, leave the flag out")
    for layer in policy_layers(model.sana).values():
        layer.active = cfg.policy
    names = ("num_inference_steps", "solver", "guidance_scale", "ar", "top_p", "top_k", "temperature")
    as_trained = ("num_inference_steps", "solver", "guidance_scale", "ar")        # 0 or "" keeps the run's own
    given = {name: getattr(cfg, name) for name in names if getattr(cfg, name) or name not in as_trained}
    return model, vocab, dataclasses.replace(trained, **given)


def sample(cfg: Sample) -> None:
    """Restore a picture or a folder with trained weights, into --output."""
    if cfg.caption and cfg.captions:
        raise UserError("--captions: goes not together with --caption, give one of them")
    captions = read_captions(cfg.captions)
    if not cfg.landmarks:
        match_captions(captions, list_images(cfg.input) if captions else [], cfg.captions)
    files = {name: path for path, name in output_names(list_images(cfg.input)).items()}
    run = Run(cfg)
    model, vocab, trained = load_networks(cfg)
    model.to(run.device).eval().requires_grad_(False)
    room = caption_room(vocab, model.tatok.count, trained.context)

    def told(stem):  # a photograph's faces share its caption
        photo = re.sub(r"_\d+$", "", stem) if cfg.landmarks else stem
        text = caption_of(captions, files[photo]) if cfg.captions else cfg.caption
        words = len(vocab.encode(" " + text))
        if words > room:
            print(f"caption of {stem}: {words} words, cut to the first {room}, which fit --context {trained.context}",
                  flush=True)
        if isinstance(vocab.tokenizer, ToyTokenizer) and 1 in vocab.tokenizer.encode(text):
            print(f"caption of {stem}: has words that a toy run does not know, only those of its own captions",
                  flush=True)
        return text

    def restore_batch(lq, stems):
        # Every face gets the same noise, so that its result depends on the seed and not on its place in the folder.
        # Where words are drawn, one face is read at a time for the same reason.
        dice = lambda: torch.Generator().manual_seed(cfg.seed)
        pieces = lq.split(1 if trained.ar == "sample" else len(lq))
        texts = iter([told(stem) for stem in stems])
        with run.autocast():
            cond = torch.cat([read_face(model, vocab, trained, x, [next(texts) for _ in x], dice()) for x in pieces])
            noise = noise_like(model, trained, len(lq), dice(), shared=True)
            return {"restored_faces": draw_face(model, trained, cond, noise)}

    restore_folder(cfg, restore_batch, trained.image_size, run.device)


# ------------------------------------------------------------------------------------------------ ablations

# name -> (table, changed fields, what the paper prints for CelebA-Test at 512 px: comparable in order, not in size).
# Tables II, VIII and IX (with VII) each start from another Stage 1: Deg 54.98, 54.06 and 60.99.
STAGE1, NO_LPIPS, NO_LMD = dict(stage="1.2"), dict(lpips_weight=0.0), dict(lmd_weight=0.0)
NO_FIDELITY = dict(identity_weight=0.0) | NO_LPIPS | NO_LMD
ABLATIONS = {
    # 400 texture steps: the 150 + 250 of the other rows, as each arm of Table VII has 100k (section V-D)
    "no AR branch, equal steps": ("text", dict(STAGE1, semantic=False, texture_steps=400),
                                  "Table VII: LPIPS .4492, Deg 63.09, LMD 6.46"),
    "base, no text": ("text", dict(STAGE1, caption_share=0.0), "Table VII: LPIPS .4416, Deg 60.58, LMD 6.16"),
    "caption, no text": ("text", STAGE1, "Table VII: LPIPS .4413, Deg 60.99, LMD 6.25"),
    "caption, true text": ("text", dict(STAGE1, text="true"), "Table VII: LPIPS .4375, Deg 54.37, LMD 6.45"),
    "caption, read text": ("text", dict(STAGE1, text="read"), "Table VII: LPIPS .4430, Deg 58.61, LMD 7.11"),
    "caption, contradictory text": ("text", dict(STAGE1, text="contradictory"),
                                    "Table VII: LPIPS .4492, Deg 64.46, LMD 7.98"),
    "no preference": ("reward", STAGE1, "Table VIII: LPIPS .4175, Deg 54.06, LMD 5.13"),
    "aesthetic only": ("reward", NO_FIDELITY, "Table VIII: LPIPS .5099, Deg 73.99, LMD 8.36"),
    "+ identity": ("reward", NO_LPIPS | NO_LMD, "Table VIII: LPIPS .3882, Deg 47.11, LMD 3.44"),
    "+ identity + LPIPS": ("reward", NO_LMD, "Table VIII: LPIPS .3788, Deg 47.09, LMD 3.41"),
    "all rewards": ("reward", {}, "Table VIII: LPIPS .3966, Deg 49.67, LMD 4.06"),
    "stage 1.1": ("staging", dict(stage="1.1"), "Table IX: LPIPS .5272, Deg 74.53, LMD 8.68"),
    "stages 1.1 + 1.2": ("staging", STAGE1, "Table IX: LPIPS .4413, Deg 60.99, LMD 6.25"),
    "joint, equal steps": ("staging", dict(stage="joint", joint=True), "Table IX: LPIPS .4457, Deg 62.16, LMD 6.36"),
    "seeds, stage 1": ("consistency", dict(STAGE1, consistency_seeds=8), "Table X: .0122 .0182 .0185 1.2401 3.2516"),
    "seeds, stage 2": ("consistency", dict(consistency_seeds=8), "Table X: .0051 .0083 .0090 .3592 1.7214"),
    "seeds and words, stage 1": ("consistency", dict(STAGE1, consistency_seeds=8, ar="sample"), "not separated"),
    "seeds and words, stage 2": ("consistency", dict(consistency_seeds=8, ar="sample"), "not separated"),
    "NFT": ("grpo", {}, "Figure 6: rewards rise steadily"),
    "GRPO": ("grpo", dict(algorithm="grpo"), "Figure 6: becomes unstable"),
}
SHOWN = {
    "all": ("psnr", "ssim", "fid_toy", "deg_toy", "lmd_toy", "attr_toy", "reward_toy", "reward_std_toy", "deg_std_toy"),
    "text": ("psnr", "attr_toy", "reward_clip_toy", "lpips_toy", "deg_toy", "lmd_toy"),
    "reward": ("psnr", "quality_toy", "lpips_toy", "deg_toy", "lmd_toy"),
    "staging": ("psnr", "fid_toy", "quality_toy", "lpips_toy", "deg_toy", "lmd_toy"),
    "grpo": ("reward_first_train_toy", "reward_last_train_toy", "reward_toy", "deg_toy", "lmd_toy"),
    "consistency": ("hps_std_toy", "pick_std_toy", "clip_std_toy", "lmd_std_toy", "deg_std_toy")}
# Fields (with a trailing _ their beginnings) that change nothing before the named stage: it serves all rows.
LATER_FIELDS = {
    "1.1": ("semantic", "semantic_", "joint", "joint_", "caption_share", "identity_share", "condition_dropout",
            "ce_on_text", "diffusion_weight", "train_caption_projection"),
    "1.2": ("texture_", "vae_weight", "own_answers", "tie_connector_norm"),
    "2": ("algorithm", "preference_", "learning_rate", "updates_per_epoch", "rank", "lora_alpha", "groups", "group_",
          "rollout_", "timestep_", "nft_", "anchor", "decay_kind", "adv_clip", "kl_weight", "policy_", "grpo_",
          "rewards", "hps", "hps_", "clip", "clip_", "pick", "pick_", "identity_weight", "lpips_", "lmd_", "arcface",
          "fan", "vgg"),
    "": ("num_inference_steps", "solver", "guidance_scale", "ar", "top_", "temperature", "consistency_", "text",
         "stage", "validation_faces", "table", "rows", "seeds", "output", "device", "num_workers", "log_",
         "checkpointing_", "resume_")}


def matters(cfg, name: str) -> tuple:
    """The fields on which the networks after stage `name` depend."""
    level = {"tokenizer": 0, "prior": 0, "1.1": 1, "1.2": 2, "joint": 2, "2": 3}[name]
    later = tuple(f for names in list(LATER_FIELDS.values())[level:] for f in names)
    begin = tuple(f for f in later if f.endswith("_"))
    return tuple(f.name for f in dataclasses.fields(cfg) if f.name not in later and not f.name.startswith(begin))


def ablation_row(cfg, done: dict) -> dict:
    """Every stage up to cfg.stage, each trained once per configuration and kept; then measure."""
    run, faces, bank, curve = Run(cfg), CaptionedFaces(cfg), None, []
    torch.manual_seed(cfg.seed)
    model, vocab, finished, _ = build(cfg)
    model.to(run.device).eval().requires_grad_(False)

    def train_parts():
        nonlocal bank                                              # drawn only where something is left to train
        if name != "tokenizer" and cfg.bank:
            bank = bank or Bank(cfg, run, faces, model)
        reward = run_stage(name, cfg, run, faces, bank, model, vocab)
        return network_parts(model) | ({"curve": {"reward": torch.tensor(reward)}} if reward else {})

    stages = stages_of(cfg)[:stages_of(cfg).index("2" if cfg.stage == "all" else cfg.stage) + 1]
    for name in (s for s in stages if s not in finished):
        parts = shared_parts(cfg, "pref_restore", name, matters(cfg, name), train_parts)
        curve = parts.pop("curve", {}).get("reward", torch.zeros(0)).tolist()
        load_parts(model, parts, cfg, cfg.output)
        model.uses = conditions(cfg, name)
    numbers, found = measure(cfg, run, faces, model, vocab)
    if cfg.consistency_seeds:
        numbers |= consistency(cfg, run, model, vocab, found)
    if curve:
        tenth = max(1, len(curve) // 10)
        numbers |= dict(reward_first_train_toy=sum(curve[:tenth]) / tenth,
                        reward_last_train_toy=sum(curve[-tenth:]) / tenth)
    return dict(scores=numbers, curve=curve)


def ablate(cfg: Ablate) -> None:
    """Each row trains only what it changes; the rest is shared by the rows of a seed."""
    check_sizes(cfg)
    if cfg.pretrained:
        raise UserError("--pretrained: ablate trains its own networks; leave it out")
    done = run_ablation(cfg, ABLATIONS, ablation_row)
    for table in dict.fromkeys(table for table, _, _ in ABLATIONS.values()):
        print_ablation({k: e for k, e in done.items() if ABLATIONS[e["row"]][0] == table}, ABLATIONS, SHOWN[table])


VERBS = {
    "train": (Train, {"toy": Train(), "paper": Train(**PAPER)}, train),
    "sample": (Sample, {}, sample),
    "ablate": (Ablate, {"toy": Ablate()}, ablate),
}

if __name__ == "__main__":
    command_line(__doc__, VERBS)
