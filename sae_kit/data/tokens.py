"""Text to token rows: documents -> one side of the held-out split -> tokenizer -> exact packing -> mixture.

Each link is a small object that hands out the next item and knows where it stands:

    Documents    the documents of one source, pass after pass
    Packer       ids of documents -> rows of exactly `context_size` ids
    SourceRows   the rows of one source
    TokenStream  the rows of all sources, in exact shares

Nothing is thrown away but the last row of a stream that ends, and no row depends on the size of the batches in which
documents are tokenised.
"""

import logging
from typing import Literal

log = logging.getLogger(__name__)

TokenName = Literal["bos", "eos", "sep"]
STRUCTURAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
MOST_CHARACTERS = 1_000_000  # per call of the tokenizer, whose encodings take about 100 bytes a token
