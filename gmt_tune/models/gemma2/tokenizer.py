"""The tokenizer of the Gemma 2 models."""

from gmt_tune.models.chat_tokenizer import ChatTokenizer

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"


class Gemma2Tokenizer(ChatTokenizer):
    """Writes a conversation as Gemma 2 does, with torchtune's ``ModelTokenizer`` interface.

    It becomes ``<bos>`` and, for each message, ``<start_of_turn>role\\ncontent<end_of_turn>\\n``; the assistant's
    role is ``model``, and white space around the content is left out. User and assistant take turns, the user first.

    Gemma 2 knows no system message, and its Hugging Face chat template refuses one, as does this class: put the text
    at the beginning of the user's first message.

    An answer ends with ``<end_of_turn>``, plain text with ``<eos>`` (``eos_id``); either stops generation. Padding is
    ``<pad>``.

    Arguments (``path``, ``max_seq_len``) and errors are ``ChatTokenizer``'s.
    """

    family = "Gemma 2"
    special_tokens_needed = (START_OF_TURN,)
    roles = ("user", "assistant")
    alternates = True
    bos, eos, pad = "<bos>", "<eos>", "<pad>"
    message_end = END_OF_TURN
    stops = (END_OF_TURN, "<eos>")

    def header(self, role: str) -> str:
        return f"{START_OF_TURN}{'model' if role == 'assistant' else role}\n"

    def content(self, text: str) -> str:
        return text.strip()


def gemma2_tokenizer(path: str, max_seq_len: int | None = None) -> Gemma2Tokenizer:
    """The tokenizer of the Gemma 2 models; its ids equal those of their Hugging Face chat template.

    Args:
        path (str): the model's ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.
    """
    return Gemma2Tokenizer(path, max_seq_len=max_seq_len)
