#!/usr/bin/env python3
"""tokenizer_cases.json: strings, their token ids from model/assets/tokenizer.json, and their qwen2 pre-tokens.

`cases`: a list of {text, ids, pieces}; `pieces` are the pre-tokenizer's pieces of the text itself, before the byte alphabet.
`ids` come from the file as it is (no normaliser). The released Qwen3-Next tokenizer.json normalises to NFC first, GGUF
tokenizers do not; where that would change the ids, `ids_nfc` holds them. In `with_special_tokens_parsed` the text of
a special token becomes its id (llama.cpp: parse_special); the other cases hold none.

    python3 make_tokenizer.py
"""
import json, os, unicodedata
import numpy as np
from tokenizers import Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
ASSETS = f"{HERE}/../../model/assets"
FIXED = [
    "", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", " \n ", "\t", "\t\t", "\r", "\r\n", "\r\n\r\n", " \r\n \r\n ", "\n\n\n\n",
    "a", " a", "  a", "   a", "a ", "a  ", "a  b", "a   b", "a\tb", "a \t b", "a\nb", "a \n b", "a\n\n b", "a  \n\n  b", "\ta", " \ta",
    "In the beginning God created the heaven and the earth.", "And God said, Let there be light: and there was light.\n",
    "\nThe LORD is my shepherd; I shall not want.\n", "THE LORD", "LORD'S", "Lord's", "the king's", "it's", "IT'S", "It'S", "'s", "'S", " 's",
    "can't", "CAN'T", "we're", "we'Re", "I've", "I'VE", "I'm", "I'M", "he'll", "HE'LL", "she'd", "SHE'D", "'tis", "'twas", "o'clock",
    "rock 'n' roll", "''s", "'s's", "'ſ", "it'ſ", "’s", "it’s", "don’t",
    "1", "12", "123", "1234567890", " 1", " 12", "3.14", "1,000,000", "1e-6", "0x1F", "v1.2.3", "²", "x²", "½", "Ⅷ", "٣٤", "१२", "一二三", "1st 2nd",
    "abc123def", "123abc", "a1b2", "A1 B2",
    ".", "..", "...", " .", " ...", "!?", "?!\n", "...\n\n", " ;\n", ";\r\n;", "(a)", "[b]", "{c}", "<d>", "\"quoted\"", " \"quoted\" ", "—", " — ",
    "a-b", "a - b", "--", "a--b", "_", "__init__", "snake_case", "camelCase", "$100", "100%", "#hash", "@user", "a@b.co", "http://a.b/c?d=e&f",
    "é", "e\u0301", "naïve", "nai\u0308ve", "Å", "A\u030a", "ñandú", "Straße", "ﬁ", "İ", "ı", "ǅ", "ß", "Ω", "Ω\u0301", "ё", "е\u0308", "q\u0307\u0323",
    "q\u0323\u0307", "\u0301", " \u0301", "a\u200d", "\u200b", "a\u200bb", "\ufeff", "\ufeffa", "\u00a0", "a\u00a0b", "\u3000", "a\u3000b", "\u2028", "\u2029", "\u0085",
    "a\u0085b", "\u00ad", "\u202e", "\x00", "a\x00b", "\x01\x02", "\x0b", "\x0c", "\x1b[0m", "\x7f", "\x1c", "\x1f", "\u180e", "\u2003x", "\u1680",
    "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "שָׁלוֹם", "مرحبا بالعالم", "مَرْحَبًا", "你好，世界", "你好 世界", "こんにちは世界", "コンピュータ", "안녕하세요",
    "안녕", "สวัสดีชาวโลก", "नमस्ते दुनिया", "வணக்கம்", "ਸਤਿ", "ជំរាបសួរ", "אבגד", "ꙮ", "𐍈", "𝒜𝓑", "𝟙𝟚", "𠀀𠀁", "漢字かな交じり文",
    "😀", "😀😀", " 😀", "a😀b", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪", "🇩🇪🇫🇷", "❤️", "☃", "☃\n", "™", "©2024", "→", "a→b", "∑∫√", "\u20e3", "1️⃣", "\U0001f3f4\U000e0067",
    "\ufffd", "\ufffd\ufffd", "\U0010ffff", "\ue000", "\uffff", "\ufdd0",
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < n; ++i) { a[i] = b[i]; }\n", "if x:\n\tpass\n\n\n", "\"\\n\"", "a\\b", "// comment\r\n\r\n", "x = {\n  'a': 1,\n}",
    "SELECT * FROM t WHERE a='b';", "<html>\n  <body>&nbsp;</body>\n</html>", "    indented", "\tindented", "trailing   ", "trailing\n\n", "a   \n   b",
    "<|endoftext|", "<|endoftext", "|endoftext|>", "< |endoftext|>", "the the the", "shall shall", " shall", "thethe", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "withoutanyspacesinthisverylongwordofscripture", "MiXeD CaSe WoRdS", "Jesus wept.", "Selah.\n\nSelah.\n", "begat", "Mahershalalhashbaz", "Nebuchadnezzar's",
]


def main():
    tok = Tokenizer.from_file(f"{ASSETS}/tokenizer.json")
    split = json.loads(tok.to_str())
    split["pre_tokenizer"] = split["pre_tokenizer"]["pretokenizers"][0]     # the regex alone, without the byte alphabet
    split = Tokenizer.from_str(json.dumps(split)).pre_tokenizer
    rng = np.random.default_rng(19)
    alphabet = list("aZ9 \n\r\t'sS.,-😀é中\u0301\u00a0\u3000١ßt") + ["'ll", "  ", "\r\n", "the"]
    texts = FIXED + ["".join(rng.choice(alphabet, rng.integers(3, 24))) for _ in range(40)]
    held = open(f"{ASSETS}/heldout.txt").read()
    texts += [held[i:i + 200] for i in (0, 20000, 60000)]
    texts = list(dict.fromkeys(texts))
    cases = []
    for t in texts:
        ids = tok.encode(t).ids
        assert tok.decode(ids) == t, t
        entry = dict(text=t, ids=ids, pieces=[p for p, _ in split.pre_tokenize_str(t)])
        assert "".join(entry["pieces"]) == t
        nfc = unicodedata.normalize("NFC", t)
        if nfc != t: entry["ids_nfc"] = tok.encode(nfc).ids
        cases.append(entry)
    special = [dict(text=t, ids=tok.encode(t).ids) for t in ("<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> ", "<|endoftext|><|endoftext|>")]
    with open(f"{HERE}/tokenizer_cases.json", "w") as f:
        lines = ",\n".join("  " + json.dumps(c) for c in cases)
        last = ",\n".join("  " + json.dumps(c) for c in special)
        f.write('{"cases": [\n' + lines + '\n],\n"with_special_tokens_parsed": [\n' + last + "\n]}\n")
    print(len(cases), "cases")


if __name__ == "__main__": main()
