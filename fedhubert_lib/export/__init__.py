"""A trained model for other people's software: Hugging Face, torchaudio, s3prl, ONNX, and a card that describes it.

Each export is loaded again by the software it is for and compared with the source, on clips of lengths and batch sizes
that it was not made with; one that differs is an error, and nothing is left of it.
"""
