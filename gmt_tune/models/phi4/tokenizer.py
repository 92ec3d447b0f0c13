"""The tokenizer of Phi-4."""

from gmt_tune.models.chat_tokenizer import ChatTokenizer
from gmt_tune.models.chatml import END_OF_TEXT, IM_END, IM_START

IM_SEP = "<|im_sep|>"
PAD = "<|dummy_85|>"


class Phi4Tokenizer(ChatTokenizer):
    """Writes a conversation as Phi-4 does, with torchtune's ``ModelTokenizer`` interface.

    Each message becomes ``<|im_start|>role<|im_sep|>content<|im_end|>``. The release's special tokens take the white
    space around them with them, so white space at either end of a content is neither in the ids nor learnt.

    An answer and plain text end with ``<|im_end|>`` (``eos_id``). Padding is ``<|dummy_85|>``, as in the release.
    There is no beginning-of-sequence token.

    Arguments (``path``, ``max_seq_len``) and errors are ``ChatTokenizer``'s.
    """

    family = "Phi-4"
    special_tokens_needed = (IM_START, IM_SEP)
    roles = ("system", "user", "assistant")
    message_end = IM_END
    pad = PAD
    stops = (IM_END, END_OF_TEXT)
    message_break = ""

    def header(self, role: str) -> str:
        return f"{IM_START}{role}{IM_SEP}"


def phi4_tokenizer(path: str, max_seq_len: int | None = None) -> Phi4Tokenizer:
    """The tokenizer of Phi-4; its ids equal those of its Hugging Face chat template.

    torchtune's own leaves the last message open and strips spaces.

    Args:
        path (str): the model's ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.
    """
    return Phi4Tokenizer(path, max_seq_len=max_seq_len)
