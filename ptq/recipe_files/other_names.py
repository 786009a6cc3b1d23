"""What other toolkits call it: one table from their flags and arguments to ours.

People come from GPTQModel, llm-compressor, AutoRound, AutoAWQ, llama.cpp or lm-evaluation-harness with flags in their
fingers. A name that we do not have is answered with ours, on the command line, in Python and in a recipe.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["other_name"]


class Ours(NamedTuple):
    """Our name on the command line, as an argument in Python, as a key of a recipe; or a whole sentence."""

    flag: str
    argument: str
    key: str


_RUN = "That is no part of a recipe: give it on the command line."
_MODEL = "ptq takes the model as the first argument, without a flag."
_OUT = "ptq takes the folder as the first argument, without a flag."
_PROMPT = "ptq takes the prompt as the second argument, without a flag."
_OURS = {
    "model": Ours(_MODEL, "ptq takes the model as the first argument, model.", _RUN),
    "out": Ours("-o, --out", "out", _RUN),
    "method": Ours("--method", "method", "method"),
    "bits": Ours("--bits", "bits", "scheme.bits"),
    "group_size": Ours("--group-size (0 is per channel)", "group_size", "scheme.group_size"),
    "symmetric": Ours("--sym or --asym", "symmetric (True or False)", "scheme.symmetric (true or false)"),
    "scheme": Ours(
        "--preset W4A16, or --bits, --group-size and --act-bits (W4A16 is --bits 4 --group-size 128)",
        "bits, group_size and act_bits (W4A16 is bits=4, group_size=128)",
        "scheme.bits, scheme.group_size and scheme.act_bits",
    ),
    "act_bits": Ours("--act-bits", "act_bits", "scheme.act_bits"),
    "kv_bits": Ours("--kv-bits", "kv_bits", "kv_bits"),
    "calib": Ours("--calib", "calib", "calibration.source"),
    "calib_samples": Ours("--calib-samples", "calib_samples", "calibration.samples"),
    "calib_seqlen": Ours("--calib-seqlen", "calib_seqlen", "calibration.seqlen"),
    "seed": Ours("--seed", "seed", "calibration.seed"),
    "act_order": Ours("-O act_order=true or false (gptq, gptaq)", "act_order", "options.act_order"),
    "damping": Ours("-O damping=X (gptq, gptaq, coreq)", "damping", "options.damping"),
    "iters": Ours("--iters (methods that learn)", "iters", "options.iters"),
    "epochs": Ours("--epochs (methods that learn)", "epochs", "options.epochs"),
    "batch": Ours("--train-batch (methods that learn; others choose by themselves)", "batch", "options.batch"),
    "grad_accum": Ours("--grad-accum", "grad_accum", "options.grad_accum"),
    "lr": Ours(
        "--lr-offset (autoround), --lr-clip, --lr-scale or --lr-lora (ptq methods lists the options of each)",
        "lr_offset (autoround), lr_clip, lr_scale or lr_lora",
        "options.lr_offset (autoround), options.lr_clip, options.lr_scale or options.lr_lora",
    ),
    "lr_clip": Ours("--lr-clip", "lr_clip", "options.lr_clip"),
    "ignore": Ours("--ignore", "ignore", "ignore"),
    "override": Ours("--override PATTERN=bits[,gN][,asym]", "overrides", "overrides"),
    "container": Ours("--container auto, compressed-tensors or native", "container", "container"),
    "dtype": Ours("--dtype", "compute_dtype", "compute_dtype"),
    "device": Ours("--device", "device", _RUN),
    "offload": Ours("--offload", "offload", _RUN),
    "restart": Ours("--restart", "restart", _RUN),
    "resume": Ours(*["ptq needs no such option: the same command goes on by itself."] * 3),
    "head": Ours(*["ptq has no such option: embedding and head stay in full precision."] * 3),
    "sequential": Ours(*["ptq has no such option: linears are always done in the order of execution."] * 3),
    "threads": Ours(*["ptq takes this from the environment: OMP_NUM_THREADS=N."] * 3),
    "evaluation": Ours(*["That is another command: ptq eval OUT, when the model is written."] * 3),
}
"""By the name of the idea; of ``ptq quantize`` and `ptq.quantize`."""

_QUANTIZE = {
    "model": "model_id model_name model_name_or_path model_path pretrained pretrained_model pretrained_model_dir m "
    "base_model input_model hf_path hf_model",
    "out": "output output_dir output_path output_directory out_dir out_path save save_dir save_path save_directory "
    "save_quantized quant_path quantized_model_dir export_dir export_path outfile dump_quant dump",
    "method": "quant_method quantization_method algorithm algorithms algo alg modifier quantizer",
    "bits": "wbits w_bit w_bits wbit weight_bits weight_bit num_bits n_bits nbits nbit bit qbits q_bits precision_bits",
    "group_size": "groupsize q_group_size w_group_size w_groupsize group weight_group_size gs",
    "symmetric": "symmetric sym asym asymmetric w_sym w_asym is_sym zero_point zeropoint use_symmetric",
    "scheme": "quant_scheme quantization_scheme qtype ftype outtype type quant_type target_bits quantization w_dtype",
    "act_bits": "a_bits a_bit abits act_bit input_bits activation_bits activation_bit",
    "kv_bits": "kv_bit k_bits v_bits k_bit v_bit kvbits kv_cache_bits kv_cache_dtype kv_cache_scheme kv_cache_qformat",
    "calib": "dataset datasets dataset_name dataset_path dataset_id data data_path calib_data calib_dataset imatrix "
    "calibration calibration_data calibration_dataset calibration_text text source",
    "calib_samples": "nsamples n_samples num_samples samples num_calibration_samples n_calib_samples calib_size "
    "calibration_samples max_calib_samples num_calib_samples calib_num_samples num_calib_data nsample",
    "calib_seqlen": "seqlen seq_len seq_length sequence_length max_seq_length max_seq_len max_length model_max_length "
    "max_calib_seq_len calib_seq_len calib_seq_length calibration_seqlen calib_max_length ctx_size block_size",
    "seed": "random_seed calib_seed calibration_seed",
    "act_order": "act_order desc_act actorder static_groups no_act_order",
    "damping": "percdamp perc_damp damp damping damp_percent damp_frac dampening dampening_frac damp_auto_increment",
    "iters": "iterations steps num_steps n_steps train_steps max_steps",
    "epochs": "num_epochs n_epochs train_epochs num_train_epochs",
    "batch": "batch_size bs train_bs per_device_train_batch_size calib_batch_size",
    "grad_accum": "gradient_accumulate_steps gradient_accumulation_steps",
    "lr": "lr learning_rate",
    "lr_clip": "minmax_lr lwc_lr",
    "ignore": "layers_to_skip skip_layers skip_modules modules_to_not_convert modules_to_skip ignored_layers exclude "
    "exclude_layers exclude_modules fp_layers fp16_layers ignore_layers not_use_layers",
    "override": "dynamic layer_config per_layer_config layer_bits tensor_type tensor_types mixed_precision_config",
    "container": "export_format save_format output_format fmt checkpoint_format pack_mode save_compressed",
    "dtype": "torch_dtype model_dtype precision compute_type compute_dtype",
    "device": "device_map cuda gpu gpu_id device_id devices device_num",
    "offload": "low_gpu_mem_usage low_cpu_mem_usage cpu_offload offload_folder disk_offload offload_dir "
    "offload_to_disk",
    "restart": "force overwrite overwrite_output_dir",
    "resume": "resume resume_from_checkpoint continue",
    "head": "lm_head quant_lm_head quantize_lm_head leave_output_tensor output_tensor_type token_embedding_type",
    "sequential": "true_sequential sequential sequential_targets sequential_update",
    "threads": "threads n_threads nthreads num_threads t",
    "evaluation": "eval tasks eval_tasks eval_ppl ppl evaluate",
}
_EVAL = {
    _MODEL: "model m model_args model_id model_name_or_path model_path pretrained hf_path base_model_name",
    "--text": "dataset datasets dataset_name dataset_path data_path file f calib wikitext",
    "--tasks": "task eval_tasks benchmark benchmarks",
    "--fewshot": "num_fewshot n_shot nshot shots n_shots few_shot",
    "--seqlen": "seq_len seq_length sequence_length max_length max_seq_length max_seq_len ctx_size ctx n_ctx c "
    "context_size context_length block_size model_max_length calib_seqlen",
    "--stride": "ppl_stride sliding_stride",
    "--limit": "nsamples n_samples num_samples max_samples num_examples samples calib_samples",
    "-o, --out": "output output_path output_dir out_file outfile save save_path",
    "--batch-size": "bs batch batch_size b per_device_eval_batch_size eval_bs eval_batch_size",
    "--against": "kl_divergence kl_divergence_base base base_model reference reference_model ref baseline",
    "--dtype": "torch_dtype model_dtype precision",
    "--device": "device_map cuda gpu devices",
    "--data": "include_path data_dir tasks_dir",
    "--cache": "use_cache cache_dir cache_requests",
    "--seed": "random_seed",
}
_GENERATE = {
    _MODEL: "model m model_id model_name_or_path model_path pretrained",
    _PROMPT: "prompt p text input",
    "--max-new-tokens": "n_predict predict n max_tokens max_length num_tokens max_gen_toks max_new_token",
    "--temperature": "temp t",
    "--dtype": "torch_dtype precision",
    "--device": "device_map cuda gpu",
}
_FILES = {"-o, --out": "output output_path output_file outfile out_file save"}
_FOLDERS = {_OUT: "model m model_path path folder dir input"}


def _reversed(*rows: tuple[str, str]) -> dict[str, str]:
    """From rows of our name and those of others, what each of the others is called here."""
    return {name: ours for ours, names in rows for name in names.split()}


def _of_quantize(part: int) -> dict[str, str]:
    """The table of ``ptq quantize`` with one part of `Ours`; the names of the ideas themselves are in it."""
    own = {idea: ours[part] for idea, ours in _OURS.items()}
    return own | _reversed(*((_OURS[idea][part], names) for idea, names in _QUANTIZE.items()))


_COMMANDS = {
    "quantize": _of_quantize(0),
    "python": _of_quantize(1),
    "recipe": _of_quantize(2),
    "eval": _reversed(*_EVAL.items()),
    "generate": _reversed(*_GENERATE.items()),
    "compare": _reversed(*_FILES.items()),
    "report": _reversed(*_FILES.items(), *_FOLDERS.items()),
    "inspect": _reversed(*_FOLDERS.items()),
}


def other_name(where: str, name: str) -> str | None:
    """A sentence with our name for what other toolkits call ``name``; ``None`` if nobody does.

    Args:
        where: a command of ``ptq``, ``"python"`` for arguments of `ptq.quantize`, or ``"recipe"`` for keys of a recipe.
        name: as it was written, with or without dashes: ``"--w-bit"``, ``"wbits"``.
    """
    found = _COMMANDS.get(where, {}).get(name.lstrip("-").replace("-", "_").lower())
    return found if found is None or found.endswith(".") else f"ptq calls this {found}."
