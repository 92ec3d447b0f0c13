"""The tokenizer of the Qwen2.5-Instruct models."""

from gmt_tune.models.chatml import ChatMLTokenizer

# What the chat template of the Instruct models says when a conversation has no system message.
SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Qwen2_5Tokenizer(ChatMLTokenizer):
    """ChatML as Qwen 2.5 writes it: system, user and assistant messages.

    Arguments (``path``, ``max_seq_len``, ``system_prompt``) and errors are ``ChatMLTokenizer``'s.
    """

    family = "Qwen 2.5"
    roles = ("system", "user", "assistant")


def qwen2_5_tokenizer(
    path: str, max_seq_len: int | None = None, system_prompt: str | None = SYSTEM_PROMPT
) -> Qwen2_5Tokenizer:
    """The tokenizer of the Qwen2.5-Instruct models; its ids equal those of their Hugging Face chat template.

    torchtune's own leaves out the default system message and closes the last message in another way.

    Args:
        path (str): the model's ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.
        system_prompt (str | None): the system message of conversations without one; default Qwen 2.5's own,
            None for none.
    """
    return Qwen2_5Tokenizer(path, max_seq_len=max_seq_len, system_prompt=system_prompt)
