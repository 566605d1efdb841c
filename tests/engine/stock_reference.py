"""What stock vLLM answers: run as a script in a process of its own, without any plugin.

    python stock_reference.py MODEL REQUEST_FILE ANSWER_FILE

The request file holds ``{"engine": {...}, "prompts": [[...], ...], "max_tokens": n}``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def answers(llm, prompts, max_tokens, extra_args=None):
    """Prompt log-probs and greedy tokens with their log-probs, all requests at once.

    ``extra_args``: one for each prompt.
    """
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            prompt_logprobs=0,
            logprobs=0,
            ignore_eos=True,
            extra_args=extra,
        )
        for extra in extra_args or [None] * len(prompts)
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    result = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        result.append(
            {
                "prompt_logprobs": [
                    output.prompt_logprobs[i][prompt[i]].logprob for i in range(1, len(prompt))
                ],
                "tokens": list(completion.token_ids),
                "logprobs": [
                    entry[token].logprob
                    for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
                ],
            }
        )
    return result


def main() -> None:
    os.environ["VLLM_PLUGINS"] = ""  # not even loaded
    from vllm import LLM

    model, request_file, answer_file = sys.argv[1:]
    request = json.loads(Path(request_file).read_text())
    llm = LLM(model, enable_prefix_caching=False, **request["engine"])
    result = answers(llm, request["prompts"], request["max_tokens"])
    Path(answer_file).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # the answers are written; stock vLLM can abort while the interpreter exits


if __name__ == "__main__":
    main()
