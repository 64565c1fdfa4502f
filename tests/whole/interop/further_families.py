"""Families beyond docs/models.md's table, as random models of one block where one is enough."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tests.whole.interop.architectures import IMAGES, SOUND, TOKENS

HEADS = {"num_hidden_layers": 1, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
SPECIAL = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN: dict[str, Any] = {**SPECIAL, "max_position_embeddings": 64, **HEADS, **WIDTHS}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
GPT = {**SPECIAL, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
XLM = {"vocab_size": 96, "emb_dim": 64, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64}
IMAGE = {"image_size": 16, "patch_size": 8, **HEADS, **WIDTHS}
VIDEO = {**IMAGE, "num_frames": 2}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": [1, 1]}
PAIR = {"text_config": PLAIN, "vision_config": IMAGE}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 1}
TWO_STACKS: dict[str, Any] = {
    **SPECIAL,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.1,
}
WAVE = {
    **PLAIN,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}


class Family(NamedTuple):
    """A class, its config, how many matrices are selected, and what its forward pass takes."""

    name: str
    settings: dict[str, Any]
    matrices: int
    takes: str = "tokens"


def inputs(family: Family) -> dict[str, torch.Tensor]:
    """What the forward pass takes."""
    generator = torch.Generator().manual_seed(0)
    given = {
        "tokens": {"input_ids": TOKENS},
        "two": {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]},
        "images": {"pixel_values": IMAGES},
        "both": {"input_ids": TOKENS, "pixel_values": IMAGES},
        "video": {"pixel_values": torch.stack([IMAGES, IMAGES.flip(1)], dim=1)},
        "spectrum": {"input_values": IMAGES[:, 0]},
        "features": {
            "input_features": SOUND.transpose(1, 2),
            "decoder_input_ids": TOKENS[:, :5],
        },
        "wave": {"input_values": torch.randn(2, 640, generator=generator)},
        "speech": {
            "input_values": torch.randn(2, 2000, generator=generator),
            "decoder_input_ids": TOKENS[:, :5],
        },
    }
    return given[family.takes]


# model_type: class and number of matrices.
_GROUPED_DECODERS = {
    "apertus": ("ApertusForCausalLM", 6),
    "arcee": ("ArceeForCausalLM", 6),
    "bitnet": ("BitNetForCausalLM", 7),
    "cohere": ("CohereForCausalLM", 7),
    "cohere2": ("Cohere2ForCausalLM", 7),
    "cwm": ("CwmForCausalLM", 7),
    "diffllama": ("DiffLlamaForCausalLM", 7),
    "doge": ("DogeForCausalLM", 8),
    "ernie4_5": ("Ernie4_5ForCausalLM", 7),
    "exaone4": ("Exaone4ForCausalLM", 7),
    "glm": ("GlmForCausalLM", 6),
    "glm4": ("Glm4ForCausalLM", 6),
    "granite": ("GraniteForCausalLM", 7),
    "helium": ("HeliumForCausalLM", 7),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", 7),
    "hyperclovax": ("HyperCLOVAXForCausalLM", 7),
    "jais2": ("Jais2ForCausalLM", 6),
    "ministral": ("MinistralForCausalLM", 7),
    "ministral3": ("Ministral3ForCausalLM", 7),
    "nanochat": ("NanoChatForCausalLM", 6),
    "nemotron": ("NemotronForCausalLM", 6),
    "olmo": ("OlmoForCausalLM", 7),
    "olmo2": ("Olmo2ForCausalLM", 7),
    "olmo3": ("Olmo3ForCausalLM", 7),
    "seed_oss": ("SeedOssForCausalLM", 7),
    "smollm3": ("SmolLM3ForCausalLM", 7),
    "stablelm": ("StableLmForCausalLM", 7),
    "starcoder2": ("Starcoder2ForCausalLM", 6),
    "vaultgemma": ("VaultGemmaForCausalLM", 7),
    # Not decoders, but with the same settings.
    "eurobert": ("EuroBertModel", 7),
}
_PLAIN = {
    "biogpt": ("BioGptForCausalLM", 6),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", 4),
    "minicpm3": ("MiniCPM3ForCausalLM", 8),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", 6),
    "persimmon": ("PersimmonForCausalLM", 4),
    "youtu": ("YoutuForCausalLM", 8),
    "albert": ("AlbertModel", 6),
    "bert-generation": ("BertGenerationEncoder", 6),
    "camembert": ("CamembertModel", 6),
    "clip_text_model": ("CLIPTextModel", 6),
    "convbert": ("ConvBertModel", 8),
    "data2vec-text": ("Data2VecTextModel", 6),
    "electra": ("ElectraModel", 6),
    "ernie": ("ErnieModel", 6),
    "layoutlm": ("LayoutLMModel", 6),
    "megatron-bert": ("MegatronBertModel", 6),
    "mobilebert": ("MobileBertModel", 15),
    "modernbert": ("ModernBertModel", 4),
    "mpnet": ("MPNetModel", 6),
    "rembert": ("RemBertModel", 6),
    "roberta-prelayernorm": ("RobertaPreLayerNormModel", 6),
    "roformer": ("RoFormerModel", 6),
    "splinter": ("SplinterModel", 6),
    "tapas": ("TapasModel", 6),
    "visual_bert": ("VisualBertModel", 6),
    "xlm-roberta": ("XLMRobertaModel", 6),
    "xlm-roberta-xl": ("XLMRobertaXLModel", 6),
    "yoso": ("YosoModel", 6),
}
_TWO_STACKS = {
    "blenderbot": ("BlenderbotForConditionalGeneration", 16),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", 16),
    "m2m_100": ("M2M100ForConditionalGeneration", 16),
    "marian": ("MarianModel", 16),
    "mbart": ("MBartForConditionalGeneration", 16),
    "mvp": ("MvpForConditionalGeneration", 16),
    "pegasus": ("PegasusForConditionalGeneration", 16),
    "plbart": ("PLBartForConditionalGeneration", 16),
}
_IMAGES = {
    "beit": ("BeitModel", 6),
    "clip_vision_model": ("CLIPVisionModel", 6),
    "data2vec-vision": ("Data2VecVisionModel", 6),
    "deit": ("DeiTModel", 6),
    "dinov2": ("Dinov2Model", 6),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", 6),
    "dinov3_vit": ("DINOv3ViTModel", 6),
    "ijepa": ("IJepaModel", 6),
    "mlcd_vision_model": ("MLCDVisionModel", 6),
    "siglip_vision_model": ("SiglipVisionModel", 6),
    "vit_mae": ("ViTMAEModel", 6),
    "vit_msn": ("ViTMSNModel", 6),
    "vitdet": ("VitDetModel", 4),
}
_WAVES = {
    "data2vec-audio": ("Data2VecAudioModel", 6),
    "hubert": ("HubertModel", 6),
    "sew": ("SEWModel", 6),
    "unispeech": ("UniSpeechModel", 6),
    "unispeech-sat": ("UniSpeechSatModel", 6),
    "wav2vec2": ("Wav2Vec2Model", 6),
    "wav2vec2-conformer": ("Wav2Vec2ConformerModel", 9),
}
_OTHERS = {
    "bloom": Family(
        "BloomForCausalLM", {**SPECIAL, "hidden_size": 64, "n_layer": 1, "n_head": 4}, 4
    ),
    "codegen": Family("CodeGenForCausalLM", {**GPT, "rotary_dim": 8}, 4),
    "ctrl": Family("CTRLLMHeadModel", {**GPT, "dff": 96}, 6),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", GPT, 4),
    "gemma4_text": Family("Gemma4ForCausalLM", {**GROUPED, "vocab_size_per_layer_input": 96}, 9),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        {
            **SPECIAL,
            **WIDTHS,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        12,
    ),
    "gptj": Family("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, 6),
    "lfm2": Family("Lfm2ForCausalLM", {**GROUPED, "layer_types": ["full_attention"]}, 7),
    "mpt": Family(
        "MptForCausalLM",
        {**SPECIAL, "d_model": 64, "n_layers": 1, "n_heads": 4, "expansion_ratio": 2},
        4,
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaForCausalLM",
        {**GROUPED, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
        19,
    ),
    "trocr": Family("TrOCRForCausalLM", {**TWO_STACKS, "cross_attention_hidden_size": 64}, 10),
    "xglm": Family(
        "XGLMForCausalLM",
        {**SPECIAL, "d_model": 64, "num_layers": 1, "attention_heads": 4, "ffn_dim": 96},
        6,
    ),
    "xlnet": Family(
        "XLNetLMHeadModel", {**SPECIAL, "d_model": 64, "n_layer": 1, "n_head": 4, "d_inner": 96}, 2
    ),
    "big_bird": Family("BigBirdModel", {**PLAIN, "attention_type": "original_full"}, 6),
    "canine": Family(
        "CanineModel",
        {
            **PLAIN,
            "local_attention_window": 4,
            "attend_from_chunk_width": 4,
            "attend_from_chunk_stride": 4,
            "attend_to_chunk_width": 4,
            "attend_to_chunk_stride": 4,
            "downsampling_rate": 2,
        },
        18,
    ),
    "deberta": Family(
        "DebertaModel", {**PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, 5
    ),
    "esm": Family("EsmModel", {**PLAIN, "mask_token_id": 5}, 6),
    "flaubert": Family("FlaubertModel", {**XLM, "pad_index": 0}, 6),
    "fnet": Family("FNetModel", PLAIN, 2),
    "funnel": Family(
        "FunnelModel",
        {
            "vocab_size": 96,
            "block_sizes": [1],
            "num_decoder_layers": 1,
            "d_model": 64,
            "n_head": 4,
            "d_head": 16,
            "d_inner": 96,
        },
        12,
    ),
    "luke": Family("LukeModel", {**PLAIN, "entity_vocab_size": 8, "entity_emb_size": 64}, 9),
    "longformer": Family("LongformerModel", {**PLAIN, "attention_window": 4}, 9),
    "xlm": Family("XLMModel", {**XLM, "pad_index": 0}, 6),
    "xmod": Family("XmodModel", {**PLAIN, "languages": ["en"], "default_language": "en"}, 8),
    "bigbird_pegasus": Family(
        "BigBirdPegasusForConditionalGeneration",
        {**TWO_STACKS, "attention_type": "original_full"},
        16,
        "two",
    ),
    "fsmt": Family(
        "FSMTForConditionalGeneration",
        {**TWO_STACKS, "src_vocab_size": 96, "tgt_vocab_size": 96, "langs": ["en", "de"]},
        16,
        "two",
    ),
    "led": Family(
        "LEDForConditionalGeneration",
        {
            **TWO_STACKS,
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
        19,
        "two",
    ),
    "longt5": Family("LongT5ForConditionalGeneration", {**T5, "local_radius": 7}, 14, "two"),
    "mt5": Family("MT5ForConditionalGeneration", T5, 16, "two"),
    "pegasus_x": Family(
        "PegasusXForConditionalGeneration",
        {**TWO_STACKS, "block_size": 11, "num_global_tokens": 4},
        16,
        "two",
    ),
    "prophetnet": Family(
        "ProphetNetForConditionalGeneration",
        {
            **SPECIAL,
            "hidden_size": 64,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
        16,
        "two",
    ),
    "t5gemma": Family(
        "T5GemmaForConditionalGeneration",
        {"encoder": GROUPED, "decoder": GROUPED, "vocab_size": 96},
        18,
        "two",
    ),
    "umt5": Family("UMT5ForConditionalGeneration", T5, 16, "two"),
    "audio-spectrogram-transformer": Family(
        "ASTModel",
        {
            **IMAGE,
            "num_mel_bins": 16,
            "max_length": 16,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        6,
        "spectrum",
    ),
    "moonshine": Family(
        "MoonshineForConditionalGeneration",
        {
            **PLAIN,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
        16,
        "speech",
    ),
    "segformer": Family(
        "SegformerModel",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [32, 64],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
        },
        12,
        "images",
    ),
    "speech_to_text": Family(
        "Speech2TextForConditionalGeneration",
        {
            **TWO_STACKS,
            "num_conv_layers": 1,
            "conv_kernel_sizes": [3],
            "conv_channels": 32,
            "input_feat_per_channel": 80,
            "max_source_positions": 64,
            "max_target_positions": 64,
        },
        16,
        "features",
    ),
    "swin": Family("SwinModel", {**WINDOWS, "num_heads": [2, 4], "window_size": 4}, 13, "images"),
    "swinv2": Family(
        "Swinv2Model", {**WINDOWS, "num_heads": [2, 4], "window_size": 4}, 15, "images"
    ),
    "timesformer": Family("TimesformerModel", VIDEO, 7, "video"),
    "videomae": Family("VideoMAEModel", {**VIDEO, "tubelet_size": 2}, 6, "video"),
    "vivit": Family("VivitModel", {**VIDEO, "tubelet_size": [2, 8, 8]}, 6, "video"),
    "yolos": Family("YolosModel", {**IMAGE, "image_size": [16, 16]}, 6, "images"),
    "altclip": Family(
        "AltCLIPModel", {**PAIR, "text_config": {**PLAIN, "project_dim": 64}}, 12, "both"
    ),
    "blip": Family(
        "BlipModel", {**PAIR, "text_config": {**PLAIN, "encoder_hidden_size": 64}}, 14, "both"
    ),
    "chinese_clip": Family("ChineseCLIPModel", PAIR, 12, "both"),
    "clipseg": Family("CLIPSegModel", PAIR, 12, "both"),
    "git": Family("GitForCausalLM", {**PLAIN, "vision_config": IMAGE}, 13, "both"),
    "owlvit": Family("OwlViTModel", PAIR, 12, "both"),
    "siglip": Family(
        "SiglipModel", {**PAIR, "text_config": {**PLAIN, "projection_size": 64}}, 12, "both"
    ),
    "vilt": Family("ViltModel", {**PLAIN, **IMAGE}, 6, "both"),
}


def _alike(
    families: dict[str, tuple[str, int]], settings: dict[str, Any], takes: str
) -> dict[str, Family]:
    return {kind: Family(name, settings, count, takes) for kind, (name, count) in families.items()}


FAMILIES: dict[str, Family] = {
    **_alike(_GROUPED_DECODERS, GROUPED, "tokens"),
    **_alike(_PLAIN, PLAIN, "tokens"),
    **_alike(_TWO_STACKS, TWO_STACKS, "two"),
    **_alike(_IMAGES, IMAGE, "images"),
    **_alike(_WAVES, WAVE, "wave"),
    **_OTHERS,
}
