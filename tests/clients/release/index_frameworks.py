"""llama-index and dspy: what they ask of a server that speaks OpenAI's protocol."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or dspy's litellm fetches a list
MODEL, BASE = os.environ["MODEL"], os.environ["OPENAI_BASE_URL"]
QUESTION = "What is the weather in Paris?"


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def llama_index() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=MODEL, api_base=BASE, api_key="none", is_chat_model=True, is_function_calling_model=True)
    assert "sunny" in str(llm.complete("hi"))
    assert "sunny" in "".join(str(part.delta) for part in llm.stream_chat([ChatMessage(role="user", content="hi")]))
    answer = llm.predict_and_call([FunctionTool.from_defaults(get_weather)], user_msg=QUESTION)
    assert "sunny" in str(answer)
    plain = OpenAILike(model=MODEL, api_base=BASE, api_key="none", is_chat_model=False)
    assert "sunny" in str(plain.complete("hi"))


def dspy() -> None:
    import dspy as library

    lm = library.LM(f"openai/{MODEL}", api_base=BASE, api_key="none", cache=False)
    assert "sunny" in lm("hi")[0]
    with library.context(lm=lm, adapter=library.JSONAdapter()):
        found = library.Predict("question -> city: str, degrees: int")(question="The weather?")
    assert isinstance(found.degrees, int)
    text = library.LM(f"text-completion-openai/{MODEL}", api_base=BASE, api_key="none", cache=False, model_type="text")
    assert "sunny" in text("hi")[0]


if __name__ == "__main__":
    failed = []
    for client in (llama_index, dspy):
        try:
            client()
        except Exception as error:
            failed.append(client.__name__)
            print(f"{client.__name__}: {type(error).__name__}: {str(error)[:1500]}")
        else:
            print(f"{client.__name__}: ok")
    raise SystemExit(", ".join(failed) or 0)
