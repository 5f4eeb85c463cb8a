"""Some twenty chosen texts in one go, with every latent that fires on each of their tokens: what a site shows of a
dictionary without a model behind it.

An artifact of kind "prompts": a file for each text, as `sememe prompt --out` writes it, without ablations. The texts
were written for this, in several languages and scripts, with code, numbers, dates and quotations.
"""

from __future__ import annotations

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.lm import LanguageModel
from sememe.progress import track
from sememe.prompt.config import PromptConfig, PromptsConfig
from sememe.prompt.verb import Known, prompt
from sememe.shuffled import at_home, model_for
from sememe.text import TokenPolicy

__all__ = ["CHOSEN", "prompts"]

VERSION = 2

CHOSEN = {
    "english": "The old ferryman tied his boat to the pier, because the river had risen during the night.",
    "german": "Im Herbst sammeln die Kinder Kastanien, und der Bäcker verkauft wieder warmes Brot am Marktplatz.",
    "french": "Le train de nuit traverse la vallée pendant que les voyageurs dorment près de la fenêtre.",
    "spanish": "Después de la lluvia, los vecinos abrieron las ventanas y la calle olía a tierra mojada.",
    "italian": "La nonna prepara il sugo la domenica mattina, mentre il gatto dorme sulla sedia.",
    "portuguese": "Os pescadores voltaram ao porto antes do amanhecer com as redes cheias de sardinhas.",
    "russian": "Зимой озеро замерзает, и дети катаются на коньках до самого вечера.",
    "greek": "Το νησί έχει τρία χωριά και ένα μικρό λιμάνι.",
    "arabic": "في الصباح يفتح البائع دكانه ويرتب الفاكهة أمام الباب.",
    "hebrew": "הספרייה נפתחת בשעה תשע והילדים באים לקרוא.",
    "japanese": "春になると、川沿いの桜がいっせいに咲きます。",
    "chinese": "山上的茶园每年四月开始采茶。",
    "python": "def area(radius):\n    if radius < 0:\n        raise ValueError('radius must not be negative')\n"
    "    return 3.14159 * radius ** 2\n",
    "javascript": "const total = items\n  .filter((item) => item.price > 10)\n  .map((item) => item.price * 1.19);",
    "html": '<ul class="menu"><li><a href="/bread">Bread</a></li><li>Salt &amp; oil</li></ul>',
    "numbers": "The bridge is 1,204 m long, carries 38,500 cars a day and cost $217.4 million, 12% more than planned.",
    "dates": "The council met on 14 March 1897, again on 2 May 1898, and for the last time in the spring of 44 BC.",
    "quotations": '"Where did you put the key?" she asked. "Under the flowerpot," he said, "as always."',
    "list": "You will need:\n- 250 g flour\n- 3 eggs\n- a pinch of salt\n\n1. Mix the flour and the eggs.\n2. Wait.",
    "mathematics": "If $f(x) = x^2 - 4x + 3$, then f(1) = 0 and f(3) = 0, so the sum of the roots is 4.",
    "letter": "Dear Ms Okafor,\n\nthank you for your application. We regret to inform you that the post is filled.\n\n"
    "Yours sincerely,",
    "names": "Amina Yusuf flew from Lagos to Buenos Aires, where the University of La Plata had invited her.",
}
"""Texts by what they are; each a few dozen tokens."""


def prompts(
    config: PromptsConfig, *, lm: LanguageModel | None = None, fresh: bool = False
) -> artifact.Artifact:
    """Every latent that fires on some texts, or the files of that if they are there.

    Args:
        config: Which texts, which dictionary.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.
    Returns:
        An artifact of kind "prompts": NN-NAME.json for each text.
    Raises:
        ArtifactError: there is no dictionary or atlas where it should be.
        ConfigError: a text has no token that is looked at.
        MismatchError: the dictionary belongs to another model, the atlas to another dictionary, or other texts'
            files stand at config.out.
        ModelError: a text of yours is longer than the model's context; chosen ones are cut.
        ActivationError: an activation is NaN or infinite.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    model = model_for(saved, config.model)
    parents = {
        "dictionary": saved.fingerprint,
        "model": lm.fingerprint if lm is not None else language_models.fingerprint_of(model),
    }
    if config.atlas is not None:
        parents["atlas"] = artifact.load(config.atlas, "atlas").fingerprint
    identity = artifact.identity_of("prompts", VERSION, config, parents)
    if not fresh and (found := artifact.find(config.out, "prompts", identity, config, parents)):
        return found
    known = Known.of(config.atlas, None, saved)
    lm = lm if lm is not None else language_models.load(model)
    dictionary = at_home(dictionaries.load(saved.path), saved, lm)
    policy = TokenPolicy.build(saved.extra["policy"]) if saved.extra.get("policy") else TokenPolicy()
    texts = {f"{i + 1}": text for i, text in enumerate(config.texts)}
    texts = texts or {name: _cut(lm, text, policy.bos) for name, text in CHOSEN.items()}
    with (
        artifact.building(
            config.out, kind="prompts", version=VERSION, config=config, parents=parents, fresh=fresh
        ) as work,
        track("prompts", len(texts), "texts") as progress,
    ):
        for place, (name, text) in enumerate(texts.items()):
            one = PromptConfig(
                prompt=text,
                dictionary=config.dictionary,
                model=config.model,
                every=True,
                ablate=False,
                out=work.path / f"{place:02}-{name}.json",
            )
            prompt(one, lm=lm, dictionary=dictionary, known=known)
            progress.advance(1)
    return artifact.load(config.out, "prompts")


def _cut(lm: LanguageModel, text: str, bos: bool) -> str:
    """The beginning of a text that the model's context has room for."""
    room = lm.context_length
    while room is not None and len(text) > 1:
        n = len(lm.tokenizer(text, add_special_tokens=False).input_ids) + int(bos)
        if n <= room:
            break
        text = text[: len(text) * room // n or 1]
    return text
