"""Our methods with their defaults. The timed call reads the model and writes the checkpoint; the peers' do neither.

python run_ours.py MODEL TOKENS OUT --method coreq
"""

from __future__ import annotations

from measured import BITS, GROUP_SIZE, arguments, peak_mib, read_tokens, timed, write_record
from transformers import AutoTokenizer

import ptq
from calib.data.tokens import Calibration, tokenizer_hash


def main() -> None:
    options = arguments(__doc__, ["gptq", "coreq", "gptaq", "rtn"])
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    calibration = Calibration(read_tokens(options.tokens), options.tokens, 0, tokenizer_hash(tokenizer))
    scheme = {"bits": BITS, "group_size": GROUP_SIZE, "symmetric": True}

    def call() -> ptq.Report:
        return ptq.quantize(
            options.model, out=options.out, calibration=calibration, device="cpu", method=options.method, **scheme
        )

    report, figures = timed(call)
    figures |= {"peak_mib": peak_mib(), "parts": report.timing}
    write_record(options.out, "ptq", options.method, ("ptq-toolkit", "torch", "transformers"), figures)


if __name__ == "__main__":
    main()
