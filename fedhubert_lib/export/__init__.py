"""A trained model for other people's software: Hugging Face, torchaudio, s3prl, ONNX, and a card that describes it."""
