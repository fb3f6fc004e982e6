"""The `image-text-to-text` pipeline with the verdict beside the answer."""

from transformers import ImageTextToTextPipeline


class SafeVlmPipeline(ImageTextToTextPipeline):
    """
    The stock pipeline, with the verdict in each result: `"safety"` holds action, category, level, score and
    probabilities. Under the policy `"off"` its action is `"off"`. A new answer starts without white space.

    The argument `safety_policy` sets the policy of a call, as in `generate`.
    """

    def check_model_type(self, supported_models):
        """Accepts every model: transformers' own list does not contain the class of a SafeVLM."""

    def save_pretrained(self, save_directory, **kwargs):
        """Also saves the processor, which transformers' pipelines leave out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, safety_policy=None, generate_kwargs=None, **kwargs):
        if safety_policy is not None:
            if "safety_policy" in (generate_kwargs or {}):
                raise ValueError("`safety_policy` is given twice, as an argument and in `generate_kwargs`. Keep one.")
            generate_kwargs = {**(generate_kwargs or {}), "safety_policy": safety_policy}
        return super()._sanitize_parameters(generate_kwargs=generate_kwargs, **kwargs)

    def preprocess(self, inputs=None, timeout=None, **kwargs):
        if isinstance(inputs, dict) and "images" in inputs:
            inputs = {**inputs, "images": self.processor.load_pictures(inputs["images"], timeout)}
        return super().preprocess(inputs, timeout=timeout, **kwargs)

    def _forward(self, model_inputs, generate_kwargs=None):
        prompt_text, input_ids = model_inputs.pop("text"), model_inputs["input_ids"]
        generate_kwargs = {"tokenizer": self.processor.tokenizer, **(generate_kwargs or {})}
        generate_kwargs = self._prepare_generate_kwargs({**generate_kwargs, "return_dict_in_generate": True})
        output = self.model.generate(**model_inputs, **generate_kwargs)
        # One entry per prompt, also with `num_return_sequences`: `batch_size` would tear them apart.
        sequences = output.sequences.reshape(len(input_ids), -1, output.sequences.shape[-1])
        safety = output["safety"].to_list()
        return dict(generated_sequence=sequences, prompt_text=prompt_text, input_ids=input_ids, safety=safety)

    def postprocess(self, model_outputs, *args, **kwargs):
        safety = model_outputs.pop("safety")
        if isinstance(safety, dict):  # with `batch_size` the pipeline passes single items of the batch
            safety = [safety]
        records = super().postprocess(model_outputs, *args, **kwargs)
        for i, record in enumerate(records):  # several records per row with `num_return_sequences`
            record["safety"] = dict(safety[i * len(safety) // len(records)])
            self._strip(record)
        return records

    def _strip(self, record):
        """
        Removes white space before a new answer, as templates end without the space that an answer begins with. A
        continued answer keeps it.
        """
        text, prompt = record.get("generated_text"), record["input_text"]
        if isinstance(text, str) and not isinstance(prompt, str) and prompt[-1]["role"] != "assistant":
            record["generated_text"] = text.lstrip()
        elif isinstance(text, list) and len(text) > len(prompt) and isinstance(text[-1].get("content"), str):
            text[-1]["content"] = text[-1]["content"].lstrip()
