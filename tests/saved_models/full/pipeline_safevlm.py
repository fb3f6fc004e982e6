"""The `image-text-to-text` pipeline with the verdict beside the answer."""

from transformers import ImageTextToTextPipeline


class SafeVlmPipeline(ImageTextToTextPipeline):
    """
    As the stock pipeline; each result also has `"safety"`: action, category, level, score and probabilities.

    A per-call policy goes through `generate_kwargs={"safety_policy": ...}`.
    """

    def check_model_type(self, supported_models):
        """Any SafeVLM will do; its class is not in transformers' own list."""

    def save_pretrained(self, save_directory, **kwargs):
        """With the processor, which transformers' pipelines leave out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _forward(self, model_inputs, generate_kwargs=None):
        generate_kwargs = dict(generate_kwargs or {}, return_dict_in_generate=True)
        generate_kwargs.setdefault("tokenizer", self.processor.tokenizer)
        prompt_text = model_inputs.pop("text")
        input_ids = model_inputs["input_ids"]
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        output = self.model.generate(**model_inputs, **generate_kwargs)
        return {
            # One entry per prompt: several with `num_return_sequences`, which `batch_size` must not tear apart.
            "generated_sequence": output.sequences.reshape(len(input_ids), -1, output.sequences.shape[-1]),
            "prompt_text": prompt_text,
            "input_ids": input_ids,
            "safety": None if output["safety"] is None else output["safety"].to_list(),
        }

    def postprocess(self, model_outputs, *args, **kwargs):
        safety = model_outputs.pop("safety")
        if isinstance(safety, dict):  # with `batch_size` the pipeline hands over one item of the batch
            safety = [safety]
        records = super().postprocess(model_outputs, *args, **kwargs)
        for i, record in enumerate(records):  # several records per row with `num_return_sequences`
            record["safety"] = safety[i * len(safety) // len(records)] if safety else None
        return records
