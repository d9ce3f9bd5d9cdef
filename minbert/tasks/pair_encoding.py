"""How a pair of texts becomes sequences. The head of a task decides it (`minbert.model.heads.pair_encoding`)."""

PAIR_ENCODINGS = {  # and the number of sequences of an example
    "cross-encoder": 1,  # [CLS] a [SEP] b [SEP]
    "bi-encoder": 2,  # [CLS] a [SEP] and [CLS] b [SEP]
    "both": 3,  # all three of these
}
