from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlora.answers import extract_answer_letter, parse, score_format, score_total
from medlora.prompts import MCQ_STYLES, render_mcq
from medlora.records import FIELDS, LETTERS, McqRecord

DATA = Path(__file__).parents[2] / "shared" / "data"

# family -> the letter a careful reader takes (None for none) -> outputs; the options are A to E. Written for this test.
# fmt: off
CASES: dict[str, dict[str | None, list[str]]] = {
    "bare": {
        "A": [
            "[A]", "A)",
        ],
        "B": [
            "B", "b", "`B`", "Β", "Ⓑ", "2번입니다.", "B번", "B</s>", "\ufeffB\u200b", "1. B", "B!", "\n\n  B\n\n",
            "B\nB\nB",
        ],
        "C": [
            " C. ", '"C"', "С", "𝐂", "③", "③번", "3번", "C 입니다",
        ],
        "D": [
            "(D)", "Ｄ", "❹", "D<eos>", "D<end_of_turn>\n<start_of_turn>user\n정답은 A",
        ],
        "E": [
            "**E**", "E예요.",
        ],
    },
    "no letter": {
        None: [
            "", "   \n", "50", "3", "5", "20.0", "2년", "하루 3번 복용", "G", "6번", "폐렴입니다.",
            "죄송하지만 이 질문에 답할 수 없습니다.", "I cannot answer this question.",
            "I'm sorry, but I can't help with that.", "As an AI, I am unable to give medical advice.", "### ANSWER",
            "###", "Answer: N/A", "Answer: None of the above", "모두 정답입니다.", "정답 없음", "[EMPTY_RESPONSE]",
            "ABCDE", "ㄱ, ㄴ, ㄷ", "DKA",
        ],
    },
    "cut off": {
        None: [
            "정답은", "정답: ", "The answer is", "Therefore, the correct answer is (",
            "환자는 45세 남성으로 흉통을 호소하고 있다. A는 심근경색이며 B는",
            "<think>\nA일까? 정답은 B일 것 같다. 하지만", "정답은 Acute",
            "A patient with chest pain most likely has", "각 선택지를 검토하겠습니다.\nA. 아스피린은 혈소판",
            "각 선택지를 살펴보면:\nA. 아스피린: 혈소판 억제\nB. 와파린: 비타민 K 길항\nC. 헤파린:",
            "Let's look at each option.\n\n(A) is wrong because",
        ],
    },
    "korean verdict": {
        "A": [
            "해답은 A이다.", "1번 문제의 정답은 A", "정답은 A이고, 이유는 다음과 같다. B는 부작용이 크다.",
        ],
        "B": [
            "정답은 B입니다", "정답은 B입니다.", "정답은B입니다", "정답은 B다.", "정답은 B이다.", "정답은 B임",
            "정답은 B예요", "정답은 'B'입니다", "정답은 “B”입니다", "정답은 「B」입니다", "정답은 (B)입니다",
            "정답은 **B**입니다", "제 답은 B입니다.", "답변: B", "정답:\n\n**B. 폐렴**", "정답은 B. 폐렴입니다.",
            "정답은 B) 폐렴입니다.", "정답은 B 폐렴입니다.", "정답은 폐렴(B)입니다.", "문제 3의 정답은 B입니다.",
            "3번 문항 정답: 2번",
        ],
        "C": [
            "정답：C", "정답 : C", "정답 C", "[정답] C", "【정답】C", "정답 → C", "정답 - C", "답: C", "답은 3번",
            "답은 3번입니다.", "정답: 3", "정답은 3입니다.", "정답: C(3번)", "정답: 3번 (C)", "정답은 c입니다.",
            "결론: C", "정답은 바로 C입니다.", "정답은 선택지 C입니다.", "정답은 보기 C이다.",
            "정답은 급성 심근경색, 즉 C입니다.", "가장 적절한 것은 C이다.", "따라서 옳지 않은 것은 C입니다.",
            "가장 적절한 치료는 C입니다.", "따라서 C.", '{"정답": "C"}', "정답\nC", "정답은\nC",
            "### 정답\nC\n\n### 해설\nA는 틀리고 B도 틀리다.",
        ],
        "D": [
            "**정답: D**", "**정답:** D", "정답은 ④입니다.", "정답: ④", "정답: ④번", "정답은 아마 D일 것입니다.",
            "정답은 D인 것 같습니다.", "정답은 다음과 같습니다: D", "정답은 다음과 같습니다.\n\nD",
            "D가 정답입니다.", "D번이 정답입니다.", "4번이 정답이다.", "보기 중 D가 정답이다.",
            "D(폐렴)가 정답입니다.", "D. 폐렴이 정답입니다.", "따라서 D가 답이다.", "저는 D를 선택하겠습니다.",
            "그러므로 D를 고르겠습니다.", "굳이 고르자면 D입니다.",
        ],
        "E": [
            "최종 답: E", "최종 답안: E", "최종 정답은 E 입니다.",
        ],
    },
    "english verdict": {
        "A": [
            "The most appropriate next step in management is (A).", "The answer is A because aspirin inhibits COX.",
        ],
        "B": [
            "The answer is B", "The answer is B.", "the answer is b", "The answer is (B).",
            "The correct answer is: B", "The correct answer is **B. Pneumonia**.", "answer:\nB", "### ANSWER\nB",
            "## Answer:\n\nB) Pneumonia", "[[B]]", '{"answer": "B"}', "The answer is pneumonia (B).",
            "The answer is metformin, option B.", "The answer must be B and not E/T.",
            "The answer is B: the patient has pneumonia.", "The answer is probably B.", "I think the answer is B.",
            "The answer is B - 45% of cases.", "Q: What is it?\nA: B",
            "<reasoning>\nFirst: A) close 20%\n</reasoning>B",
        ],
        "C": [
            "Answer - C", "Final Answer: **C**", "Final answer\n\nC", "\\boxed{C}", "$\\boxed{\\text{C}}$",
            "\\boxed{\\textbf{(C)}}", "Therefore \\(\\boxed{C}\\).", "\\boxed{C. 41.7}",
            '{"reasoning": "A is tempting", "answer": "C", "confidence": 0.8}', "Option C is the correct answer.",
            "(C) is the best choice.", "C is correct.", "So the best answer would be C.", "I would choose C.",
            "I'd go with option C.", "My answer is C because it fits.", "Thus, C.",
            "<think>A? No, B. The answer is B.</think>\n\nC",
        ],
        "D": [
            "The answer is option D.", "Answer: D", "ANSWER: D", "<answer>D</answer>", "<answer>\nD\n</answer>",
            "D\n\n</answer>", "The correct option completing the statement is (D).",
            "The answer to this question is therefore D.", "</think>The answer is D.",
        ],
        "E": [
            "Ans: E", "The most likely diagnosis is (E).",
        ],
    },
    "letter with text": {
        "A": [
            "A (Since the options are not given, I assume",
        ],
        "B": [
            "B: 약 10[W]", "B) 계위 종속동기방식(HMS : Hierarchical Master",
            "B) Aspirin\n\nExplanation:\nA) is an anticoagulant.\nC) is an opioid.",
        ],
        "C": [
            "**C. 아스피린**", "C - aspirin", "C, because it inhibits COX.",
            "C\n\n설명: 아스피린은 COX를 억제한다. A는 항응고제이다.",
            "환자의 소견은 폐렴에 합당하다.\n\nC. 항생제 투여", "C입니다. 왜냐하면 A와 B는 틀렸기 때문입니다.",
        ],
        "D": [
            "D. 무", "(D) 급성 충수염", "④ 급성 충수염", "4번 급성 충수염", "D 급성 충수염",
        ],
    },
    "letters that are no options": {
        "A": [
            "비타민 D 결핍이다. 정답은 A.",
        ],
        "B": [
            "E. coli 감염이므로 정답은 B이다.",
        ],
        "C": [
            "정답: 비타민 D (C)", "IgA 신병증이며 A군 연쇄상구균 감염 후 발생한다. 답은 C.",
        ],
        "D": [
            "τ = F/A\n\n정답: D",
        ],
        None: [
            "정답은 비타민 D입니다.", "정답은 B형 간염입니다.", "The answer is vitamin D.",
            "The answer is hepatitis B.", "The answer is E. coli.", "The answer is C. difficile infection.",
            "The answer is C-reactive protein.", "The answer is a beta blocker.",
            "Answer: A 45-year-old man should be given aspirin.", "Answer: I don't know.", "B=π×10^-2, X=1.26×",
            "C 언어에서 사용되는 자료형이 아닌 것은?", "E = mc^2", "A점의 표고: 100m\nB점의 표고: 104m", "B세포",
            "The answer is B cells.", "비타민 C가 정답입니다.", "이온강도 = 0.015/0.005 = 3\n\n정답: 3",
            "정답: 3 mg", "정답: 3.5", "정답은 50입니다.",
        ],
    },
    "reasoning first": {
        "A": [
            "보기 (Options):\nA: 5.2, B: 21.8, C: 26.4, D: 30.0\n정답 (Answer): A",
        ],
        "B": [
            "A와 B 중에서 고민되지만 정답은 B입니다.", "정답은 A와 B 중 B입니다.",
            "Between A and B, the answer is B.", "Answer must be exactly one character: A, B, C, D, or E.\n\nB",
        ],
        "C": [
            "Option A is incorrect. Option B is incorrect. Option C is correct. The answer is C.",
            "facts: 발열\nanalysis: A는 맞지 않고 B가 맞다\nanswer:\nC",
            "이 환자는 폐렴이다. (A)와 (B)는 바이러스 치료제이다.\n\n(C)",
            "The patient has X.\n\n**C**\n\nThis is because A and B are contraindicated.",
            "A도 가능하지만 가장 적절한 것은 C이다.",
        ],
        "D": [
            "A는 틀렸다. B는 금기이다. C는 효과가 없다. 따라서 정답은 D이다.",
            "A: 오답\nB: 오답\nC: 오답\n\n정답: D",
        ],
        "E": [
            "A. 아스피린\nB. 와파린\nC. 헤파린\nD. 클로피도그렐\nE. 알테플라제\n\n정답: E",
        ],
    },
    "denial and correction": {
        "B": [
            "정답은 A가 아니라 B입니다.", "A가 아니라 B가 정답입니다.", "The answer is B, not C.",
            "B rather than C is the answer.", "정답: A\n\n(정정) 정답: B", "정답은 A처럼 보이지만 정답은 B이다.",
            "A가 정답이라면 열이 있어야 한다. 열이 없으므로 정답은 B이다.",
        ],
        "C": [
            "A는 정답이 아닙니다. 정답은 C입니다.", "The answer is not B but C.",
            "정답은 A입니다. 아니, 정답은 C입니다.", "정답은 A입니다. 아니, C입니다.",
            "The answer is A. Wait, actually the answer is C.", "The answer is A. Actually, no, it's C.",
            "A\n\n다시 계산하면 값은 45이다. 따라서 정답은 C이다.",
        ],
        None: [
            "A는 정답이 아니다.", "정답은 A가 아니다.", "The answer is not B.", "B is not the correct answer.",
            "The answer isn't B.", "The answer cannot be B.", "만약 A가 정답이라면 열이 있어야 한다.",
            "If the answer is A, fever would be present.", "Is the answer B?", "정답이 B인가요?",
            "B를 선택하면 안 됩니다.", "The wrong answer is C.", "오답은 C이다.", "A, B, C, D는 모두 오답입니다.",
            "B는 정답에서 제외됩니다.",
        ],
    },
    "several": {
        "B": [
            "정답: B\n정답: B",
        ],
        None: [
            "A, D", "A, B, C", "A or B", "A와 C", "A/B", "B 또는 D", "정답은 A와 C입니다.", "정답은 B 또는 D입니다.",
            "정답은 A나 B입니다.", "정답: A, C", "정답은 B(폐렴) 혹은 C(결핵)입니다.",
            "정답은 A. 폐렴 또는 B. 결핵입니다.", "정답은 A일 수도 있고 B일 수도 있습니다.",
            "The answer could be A or B.", "The answer is either A or B.", "The answer is A or possibly B.",
            "The correct answers are (F) and (J).", "The correct answers are A and C.", "Both A and B are correct.",
            "정답은 A입니다. 정답은 B입니다.", "정답: A\n정답: B", "Answer: A\nAnswer: B\nAnswer: C", "A\nB\nC\nD",
            "B\n\nA", "질문 1의 정답은 C, 질문 2의 정답", "1번 문제의 정답은 A, 2번 문제의 정답은 B입니다.",
            "정답은 A입니다. 그런데 B도 정답일 수 있습니다.", "A. 아스피린\nB. 와파린\nC. 헤파린",
            "정답은 A, B, C, D, E 중 하나입니다.",
        ],
    },
    "runs on": {
        "B": [
            "정답: B\n\n질문: 다음 중 옳은 것은?\nA. 가\nB. 나\n정답: D", "B\n\n질문: 다음 중 옳은 것은?\n정답: D",
        ],
        "C": [
            "The answer is C.\nQuestion 2: What is it?\nThe answer is D.",
        ],
        "D": [
            "질문: 옳은 것은?\n정답: D",
        ],
    },
    "more ways to say it": {
        "A": [
            "Ａ．폐렴", "정답은 Α이다", "Since vitamin B deficiency and hepatitis C are present, the answer is A.",
        ],
        "B": [
            "답은 ②번입니다", "정답은 Ｂ입니다", "정답은 Ｂ．", "A\n\n따라서 정답은 B이다",
            "The answer is A... no wait, B.", "I first thought A, but the answer is B.", "A? No, B.",
            "I said A earlier but the correct answer is B.", "정답은 A, 아니 B입니다.", "정답은 A가 아닌 B입니다.",
            "A 대신 B가 정답이다.", "A보다 B가 더 적절하다.", "B가 A보다 더 적절하다.", "정답은 A도 C도 아닌 B이다.",
            "A와 C는 오답이고 B가 정답이다.", "A, C, D, E는 모두 오답이므로 정답은 B입니다.",
            "A, C, D, E는 틀렸으므로 B.", "The answer is B since A, C, D, and E are wrong.",
            "The answer is B, C is wrong because it is rare.", "정답은 B이다. A, C, D는 오답이다.",
            "정답: B\n\nA: 오답\nC: 오답\nD: 오답", "정답: B\n\nA. 오답이다\nB. 정답이다\nC. 오답이다",
            "A. 오답\nB. 정답\nC. 오답\nD. 오답\nE. 오답", "A: ✗\nB: ✓\nC: ✗", "B\n\nA는 틀리고 C는 맞지 않다.",
            "B. 폐렴\n\nA. 결핵은 아니다.\nC. 천식도 아니다.", "B\n(이유: 발열)", "B - 이유는 발열",
            "B입니다. A는 틀립니다.", "B, 발열 때문에", "B (폐렴)", "B(폐렴)", "B번 폐렴",
            "Based on the findings, A is unlikely and C is rare. B is the most likely answer.",
            "1. 환자는 발열이 있다.\n2. 기침이 있다.\n3. 정답은 B이다.", "1단계: 분석\n2단계: 비교\n\n최종 답: B",
            "1. A는 틀림\n2. B는 맞음\n\n답: B", "정답은 B입니다. (A는 1번, C는 3번)",
            "2번이 정답입니다. 1번은 틀렸고 3번은 드뭅니다.", "1번은 아니고 2번이 맞습니다.",
            "1번, 3번은 오답이고 정답은 2번이다.", "10번 문제 정답: B", "문제 1. 정답: B", "Q1. B", "문제 1: B",
            "1번 - B", "정답은 B입니다.\n\n다음 문제: 다음 중 옳은 것은? 정답은 C입니다.",
            "정답: B\n\n문제 2. 옳은 것은?\n정답: C", "answer:\nB\n\n질문: 다음\nA. 가\nB. 나\n풀이:\nanswer:\nC",
            "B\n\n### Question 2\nanswer: C", "answer:\nB\nanswer:\nB",
            "evaluation: 점수표: A=3, B=5, C=1\nanswer:\nB",
            "analysis: A(틀림); B(맞음); C(틀림)\nevaluation: B가 최선\nanswer:\nB",
            "정답은 B입니다.정답은 B입니다.정답은 B입니다.", "B, B, B", "The answer is (B", "The answer is B)",
            "정답은 (B", "정답: B) 폐", "정답은 B.", "Answer:\n\n\nB", "Answer:B\n", "answer : B", "Answer:**B**",
            "Answer. B", "Answer; B", "Answer> B", "Answer is: **B**", "Answer B is correct.", "Answer choice B",
            "정답은 ‘B’입니다.", "정답은 <B>입니다.", "정답은 [B]입니다.", "정답은 {B}", "정답은 `B`입니다",
            "정답은 B！", "정답은 B。", "정답은…B입니다", "정답은... B!", "정답은? B입니다.",
            "정답이 뭘까요? B입니다.", "정답은 무엇일까요? 바로 B입니다!", "답이 B인 이유는 다음과 같다.",
            "정답이 B인 이유는 발열 때문이다.", "B가 정답인 이유는 발열 때문이다.", "B가 정답으로 적절하다.",
            "정답으로는 B가 적절하다.", "정답으로 B를 선택한다.", "정답으로 가장 적절한 것은 B이다.",
            "정답에 해당하는 것은 B이다.", "죄송합니다. 정답은 B입니다.", "확실하지 않지만 B입니다.",
            "확실하지 않지만, 정답은 B인 것 같습니다.", "I'm not sure, but I think the answer is B.",
            "I am not a doctor, but the answer is B.", "This is not medical advice. Answer: B",
            "If I had to choose, B.", "If I had to guess, I'd say B.", "I'd say B.",
        ],
        "C": [
            "정답은 C번입니다.", "정답은 (3)입니다.", "정답 ③", "③이 정답입니다.", "③이 옳다.", "정답: 3번. 폐렴",
            "정답: 3) 폐렴", "정답은 3번 폐렴입니다.", "3번 폐렴이 정답입니다.", "정답은 3번(폐렴)입니다.",
            "보기 3번이 정답입니다.", "3번 보기가 정답입니다.", "선택지 3이 정답입니다.", "3번을 선택합니다.",
            "（Ｃ）", "정답: A\n\n해설: 계산하면 45이므로 정답은 C이다.",
            "처음에는 A라고 생각했지만, 다시 보니 정답은 C입니다.", "처음에 A가 정답이라고 생각했으나 C가 맞습니다.",
            "The question asks which is NOT true. A is true. B is true. C is false. D is true. So the answer is C.",
            "다음 중 틀린 것은? A는 옳다. B는 옳다. C는 틀리다. 따라서 답은 C.", "C\n### ANSWER\nC",
            "### ANSWER\n[C]", "### ANSWER\nC. 아스피린", "### ANSWER: C", "### ANSWER C", "###ANSWER\nC",
            "# ANSWER #\nC", "ANSWER\n===\nC", "### ANSWER\n3", "### ANSWER\n③", "### ANSWER\nC (아스피린)",
            "My reasoning: the drug A inhibits B. Answer: C", "약물 A는 효소 B를 억제한다. 정답: C",
        ],
        "D": [
            "이 문제의 정답은 D 입니다", "따라서, 정답은 **D. 백혈구수**입니다.", "그러므로 올바른 답은 D.",
            "옳은 답은 D입니다", "정답은 'D. 백혈구수' 입니다", "정답: D (백혈구수)", "정답: (D) 백혈구수",
            "정답 : D번", "정답=D", "답 : D", "답) D", "답 D", "정답) D", "A: D", "결론적으로 D가 가장 적절합니다.",
            "결론적으로, 가장 적절한 선택은 D입니다.", "따라서 D가 가장 적합한 답변입니다.",
            "가장 적절한 답은 D입니다.", "따라서 D번이 가장 적절하다.", "D가 맞습니다.", "D가 옳습니다",
            "D 선택지가 맞습니다.", "선택지 D가 가장 적절합니다.", "D를 정답으로 선택합니다.", "D로 결정하겠습니다.",
            "D라고 생각합니다.", "제 생각에는 D입니다.", "저는 D라고 생각합니다.", "아마도 D일 것입니다.",
            "D일 것 같습니다.", "D 같습니다.", "정답은 D인 백혈구수입니다.", "정답은 D에 해당합니다.",
            "정답은 D로 판단됩니다.", "정답은 D라고 할 수 있습니다.", "정답은 D로 볼 수 있습니다.",
            "정답은 D일 가능성이 높습니다.", "정답은 D, 백혈구수입니다.", "정답은 D - 백혈구수",
            "정답은 D번 백혈구수입니다.", "정답은 D뿐이다.", "정답은 D만 해당됩니다.", "'D'가 정답입니다.", "<D>",
            "{D}", "D)", "D:", "답:D", "D.백혈구수", "D.Leukocyte", "## D", "- D", "> D", "# 정답: D", "***D***",
            "*D*", "__D__", "~~A~~ D", "정답: **D**입니다", "**정답은 D입니다.**", "**정답은** D입니다", "**답**: D",
            "### 정답: (D)", "### 정답\n**D. 백혈구수**", "### 최종 답변\nD", "### 결론\n따라서 정답은 D입니다.",
            "정답\n\nD. 백혈구", "Answer\nD", "The answer\nD", "The correct answer is option (D).",
            "The correct answer is choice D.", "The correct answer is letter D.", "The correct answer would be D.",
            "Correct answer: D", "Correct Answer: D) Leukocyte", "Correct option: D", "The right answer is D!",
            "Answer is D", "answer is (d)", "Answer: d", "Answer:d", "ANSWER=D", 'Answer: "D"', "Answer: Option D",
            "Option D", "Choice D", "option d", "선택지 D", "보기 D", "Option D is correct.", "Option D: leukocyte",
            "Choice (D) is right.", "D is the answer", "D is the best answer", "D is the most appropriate answer.",
            "D seems correct.", "I choose D", "I select option D", "I'll go with D.", "My final answer is D",
            "Final answer: D", "Final Answer: The final answer is $\\boxed{D}$. I hope it is correct.",
            "The best option is D.", "The best choice is therefore D.", "It's D.", "It is D", "That would be D.",
            "Definitely D.", "Probably D", "I believe it's D.", "So it's D.", "So D is the answer.",
            "So the answer's D.", "The answer: D", "Answer (D)", "(Answer: D)", "(정답: D)", "[Answer] D",
            "[ANSWER: D]", "**Answer**: D", "**Answer:** (D)",
            "Let's think step by step. A is wrong. B is wrong. So the answer is (D).",
            "We refer to Wikipedia articles on medicine for help. The answer is (D).",
            "the most appropriate treatment is option D: antibiotics", "The most likely diagnosis is D. Pneumonia",
            "The most likely diagnosis is: D", "Therefore, the most appropriate next step is (D) CT.",
            "Therefore, the correct answer is: \n\n(D) CT", "The answer is:\n\nD",
            "Thus, the correct answer is:\n\n**D. CT**", "Therefore, option (D) is the most appropriate.",
            "Thus option D is the best fit.", "This corresponds to option D.", "which corresponds to option (D).",
            "This matches option D.", "이는 D에 해당한다.", "따라서 D에 해당한다.", "이는 선택지 D와 일치합니다.",
            "따라서 선택지 D와 일치합니다.", "정답： Ｄ", "ANSWER：D", "혈액형이 A형인 환자와 B형인 환자. 정답은 D",
        ],
        "E": [
            "candidates: A, B, C, D, E\ncriteria: 발열\nanswer:\nE", "점 A에서 점 B까지 거리는 5이다. 정답: E",
        ],
    },
    "no letter, several, denied or no option": {
        None: [
            "정답은 F입니다.", "정답은 6번입니다.", "정답은 0번", "정답: 10", "정답은 ㄱ, ㄴ입니다.",
            "정답은 가입니다", "정답은 폐렴이다.", "The answer is pneumonia.", "Answer: Pneumonia",
            "Answer: Diabetes", "Answer: Both", "Answer: All", "Answer: ABC", "Answer: AB", "정답: AD",
            "정답은 알 수 없습니다.", "정답을 선택할 수 없습니다.", "No correct answer.", "정답이 없습니다.",
            "해당 없음", "모름", "I don't know", "Error", "null", "None", "undefined",
            "A는 발열, B는 기침, C는 통증, D는 구토를 나타낸다.", "A는 옳고 B는 틀리다.", "A patient needs rest.",
            "A 환자는 45세이다.", "A가 가장 흔하지만 B도 흔하다.", "Choose one: A, B, C, D, E",
            "Please select A, B, C, D or E.", "다음 중 하나를 고르세요: A, B, C, D, E", "A 또는 B 중 하나입니다.",
            "A or B, hard to say.", "Either C or D.", "정답은 C 아니면 D.", "C와 D 모두 정답입니다.",
            "정답은 C, D 두 개입니다.", "C and D", "C & D", "C+D", "C, D", "(C), (D)", "C D", "B와 C가 정답입니다.",
            "B, C가 정답", "정답은 B와 C 모두이다.", "1, 3번", "1번과 3번", "①, ③", "정답: ①, ③",
            "정답은 1번과 3번입니다.", "①③", "정답은 B 또는 C일 수 있습니다.", "B일 수도 있습니다.",
            "It might be B or it might be C.", "I'm torn between B and C.", "B와 C 사이에서 고민된다.",
            "B인지 C인지 확실하지 않다.", "B or C?", "B? C?", "Answer: B or C", "Answer: B/C", "Answer: B (or C)",
            "Answer: B, possibly C", "Answer: B and C", "Answer: (B) or (C)", "Answer: B?\nC?",
            "The answer is B. The answer is C.", "정답은 B. 정답은 C.", "B가 정답입니다. C가 정답입니다.",
            "정답은 B입니다. 하지만 C도 정답입니다.",
            "질문: 다음 중 옳은 것은?\nA. 가\nB. 나\nC. 다\nD. 라\nE. 마\n정답:",
            "질문: 옳은 것은?\n① 가\n② 나\n③ 다", "① 가 ② 나 ③ 다 ④ 라 ⑤ 마", "A. 가 B. 나 C. 다 D. 라 E. 마",
            "(A) 가 (B) 나 (C) 다", "A) 가\nB) 나\nC) 다\nD) 라\nE) 마\n\n", "보기\nA. 가\nB. 나",
            "Option (A) is incorrect because it is rare. Option (B) is incorrect because",
            "A is not correct. B is not correct.", "A는 정답이 될 수 없다. B도 정답이 아니다.", "It is not A.",
            "Not B.", "B는 아니다.", "B는 아닙니다.", "B가 아닙니다.", "B 아님", "정답은 B 아님",
            "정답은 B가 아닌 것 같습니다.", "B는 오답입니다.", "B는 틀렸습니다.", "B is wrong.", "B is incorrect.",
            "B is not the answer.", "The correct answer is not B.", "the answer is definitely not B",
            "The answer isn't A or B.", "정답이 B일 수 없다.", "정답이 B라고 할 수 없다.",
            "정답이 B라면 C는 아니다.", "Why is B the answer?", "왜 B가 정답인가?", "B가 정답일까?",
            "Assuming B is the answer, we would expect fever.", "If B is correct, fever occurs.",
            "Had the answer been B, fever would occur.", "학생은 정답이 B라고 생각했다.", "A형 간염", "B형", "C군",
            "D-dimer 상승", "E등급", "비타민 B", "hepatitis C", "Vitamin D deficiency", "Group B streptococcus",
            "Grade C", "type A", "Factor D", "E. coli", "C. diff", "CD4", "B12", "A1c", "C3", "D5W", "H2O", "pH 7.4",
            "T4", "x = A", "A+B", "A=B", "F/A", "A>B>C", "A-B-C-D", "A → B → C", "B→A→C", "가-나-다", "A, C, B 순서",
            "A (X)\nB (O)\nC (X)", "A는 맞는 설명이다. B는 맞는 설명이다. C는 틀린 설명이다.",
            "answer:\nB\nanswer:\nC", "facts: 발열\ncandidates: A: 폐렴, B: 결핵", "BBBB", "### ANSWER\nNone",
            "### ANSWER\nA, C", "### ANSWER\n폐렴", "### ANSWER\n\n", "### ANSWER\n50",
            "### ANSWER\nC\n\n### ANSWER\nD", "answer choice B is incorrect", "정답은 그림의 B이다",
        ],
    },
    "solutions": {
        "A": [
            "The patient has hepatitis B. Vitamin D is low. The answer is A.",
        ],
        "B": [
            "정답 (Answer): B\n\n설명 (Explanation): 전류는 전압에 비례한다. V = IR이므로 R = 10Ω이다.",
            "정답 (Answer): B. 전류", "B\n\n설명 (Explanation):\n옵션 A는 전압, 옵션 C는 저항이다.",
            "질문이 불완전하여 답변할 수 없습니다. 하지만 B가 정답일 가능성이 높습니다.",
            "주어진 보기에는 정답이 없습니다. 가장 가까운 것은 B입니다.",
            "계산 결과 42.5로, 이는 보기 B(42.5)에 해당합니다.",
            "선택지 분석:\nA. 아스피린 - 금기\nB. 헤파린 - 적절\nC. 와파린 - 부적절\n\n따라서 B가 정답",
            "선택지 분석:\n\n**A. 아스피린**\n- 금기이다.\n\n**B. 헤파린**\n- 적절하다.\n\n**C. 와파린**\n- 느"
            "리다.\n\n**정답: B. 헤파린**", "1. **A. 아스피린**: 금기\n2. **B. 헤파린**: 적절\n\n최종 답변: **B**",
            "Let's analyze:\n\nA) Aspirin - contraindicated\nB) Heparin - appropriate\nC) Warfarin - slow\n\nT"
            "he best answer is B) Heparin.", "So, the answer is not (A) but (B).",
            "reasoning:\nfacts:\n- 발열\ncandidates:\n- A, B, C, D, E\ncriteria:\n- 우선순위\nanalysis:\nB가 "
            "표준이다.\nevaluation:\n- 점수표: A=0, B=3, C=0, D=0, E=0\n- 근거요약: A(아님); B(표준); C(제한적"
            ")\nanswer:\nB", "select_A_E\nanswer:\nB",
            "Answer must be exactly one character: A, B, C, D, or E.\nanswer:\nB",
        ],
        "C": [
            "질문 (Question): 다음 중 옳은 것은?\n보기 (Options):\nA: 가, B: 나, C: 다, D: 라\n정답 (Answer): C",
            "C: 3.14\n\n(설명: A: 2.71은 자연상수이다)", "정답은 C: 45입니다. 왜냐하면 A: 30은 너무 작고 B: 40은",
            "정답은 C입니다.\n\n하지만 제공된 보기 중에서는 정확한 답을 찾을 수 없습니다.",
            "계산 결과는 42.5이며 보기 중 가장 가까운 값은 C이다.", "따라서 답은 42.5 (C)입니다.",
            "따라서 42.5입니다. 정답: C", "정답은 C 입니다 . 설명 : A 는 틀렸습니다 .", "C. 42.5\n\n정답: C",
            "A. 10\nB. 20\nC. 30\nD. 40\n\n정답: C. 30", "A. 10\nB. 20\nC. 30\nD. 40\n\n계산하면 30이므로 C.",
            "A. 10\nB. 20\nC. 30\nD. 40\n\nC", "A. 10\nB. 20\nC. 30\nD. 40\nC",
            "- A: 틀림\n- B: 틀림\n- C: 맞음\n- D: 틀림\n\n→ C", "=> C", "→ C", "∴ C", "∴ 정답은 C",
            "(A) 가능성 낮음 (B) 가능성 낮음 (C) 가능성 높음\n\n최종 선택: (C)",
            "The answer is (C) because options (A), (B), and (D) are incorrect.",
            "We can rule out A and B. This leaves C. The answer is C.", "I would lean towards option C.",
            "My best guess is C.", "If I had to guess, C.", "The most appropriate answer is therefore option C.",
            "Given the above, C is the most appropriate next step.",
            "Given the above, the most appropriate next step is to give aspirin (C).",
            "Thus, the most appropriate next step is to give aspirin, which is option C.",
            "so the final answer is c", 'the answer is "c"', "Answer is 'C'", "The answer is C\n\nThe answer is C",
            "The correct answer is C.\n\nExplanation: A would be correct if the patient were febrile.",
            "정답은 C입니다. 만약 환자가 소아라면 A가 정답입니다.",
            "정답은 C이다. A를 선택한 사람은 부작용을 고려하지 않은 것이다.", "정답은 C이며 B가 아니다.",
            "정답은 C이고 B는 정답이 아니다.", "answer: C<end_of_turn>", "answer:\nC<end_of_turn>\nanswer:\nD",
            "The answer is C. Start 0.9% NS fluid first.", "The answer is C. C. C. C. C.",
            "정답: C\n해설: 정답은 C이다. 오답인 A는 ...", "해설: A가 정답이라고 오해하기 쉽다.\n정답: C",
            "오답 분석: A, B, D\n정답: C", "오답: A\n정답: C", "정답: C\n오답: A, B, D, E",
            "A(x), B(x), C(o), D(x)\n정답: C", "가장 적절한 답은 C라고 생각합니다. 다만 B도 고려할 수 있습니다.",
            "정답은 C입니다. 다만 B도 고려할 수 있습니다.",
        ],
        "D": [
            "정답은 D입니다. 하지만 문제에서 요구하는 것은", "환자 A는 발열, 환자 B는 기침. 정답은 D",
            "Option (A) is wrong. Option (B) is wrong. Option (C) is wrong. Therefore, the answer is (D).",
            "C 또는 D인데, D가 더 적절하므로 정답은 D", "C → D로 정정합니다.", "정답: C → 정정: D", "~~C~~ D",
        ],
        "E": [
            "A군은 대조군, B군은 실험군이다. 따라서 정답은 E이다.",
        ],
    },
    "values and cut offs": {
        None: [
            "따라서 정답은 42.5이다.",
            "**A. 아스피린**\n- 금기이다.\n\n**B. 헤파린**\n- 적절하다.\n\n**C. 와파린**\n- 느리다.",
            "Therefore, the best answer is (A) or (B).", "The answer is (A) and (B).",
            "The correct answer is (A), (B), and (C).",
            "The answer is (A). However, some argue (B) could also be correct.",
            "We can rule out A, B, C and D, leaving E.", "B가 정답이 아닌 이유는 금기이기 때문이다. C를 투여한다.",
            "reasoning:\nfacts:\n- 발열\ncandidates:\n- A, B, C, D, E\ncriteria:\n- 우선순위\nanalysis:\nB가 "
            "표준이다.\nevaluation:\n- 점수표: A=0, B=3, C=0, D=0, E=0\n- 근거요약: A(아님); B(표준); C(제한적"
            ")\nanswer:\n", "Answer must be exactly one character: A, B, C, D, or E.", "C C", "CC",
            "정답은 (나)이다.", "정답은 2와 3이다.", "정답은 25번", "3번째 항목", "정답은 3가지입니다.",
            "정답은 3개다", "정답: 3, 4", "정답: 2~3", "정답: 2번 또는 3번", "정답: 1.5배", "정답: 3:2", "답: 3/4",
            "답은 -2", "정답은 2%입니다", "정답은 5mg이다", "정답: 5 mg/kg", "The answer is 3.5",
            "The answer is 3 mg.", "The answer is 42", "Answer: 3 days", "Answer: C3 deficiency", "Answer: E2",
            "Answer: B12", "Answer: A1", "Answer: CT", "Answer: DKA", "Answer: Co-trimoxazole", "Answer: D5W",
            "Answer: B-cell lymphoma", "Answer: A beta-blocker", "정답은 CT입니다", "정답은 B-cell 림프종",
            "정답: E형 간염", "정답: D-이합체", "정답은 A군 연쇄구균입니다", "정답은 C반응단백", "정답은 A씨이다",
            "정답은 D병원이다",
        ],
    },
    "written without a look at the rules": {
        "A": [
            "해당 질환은 B형 간염이며, 치료제는 테노포비르이다. 따라서 정답은 A. 테노포비르.",
            "C. difficile 감염이 의심된다. 경구 반코마이신을 투여한다. 정답 A", "A. 수액 투여\n\n이유: B. 는 금기",
        ],
        "B": [
            "문제를 분석해 보겠습니다.\n\n1) 환자는 38세 여성\n2) 검사상 TSH 상승\n\n갑상선기능저하증이 의심되"
            "므로 레보티록신 투여가 적절합니다.\n\n정답: B) 레보티록신",
            "②번이 정답입니다. ①번은 금기, ③번은 효과 없음.", "①은 금기이고 ③은 효과가 없으므로 ②가 정답이다.",
            "① 금기 ② 적절 ③ 무효\n따라서 ②", "정답: ② 레보티록신", "정답은 ②, 레보티록신입니다",
            "E. coli O157:H7 is the cause. Answer: B. Supportive care", "정답은 B로 추정됩니다.",
            "정답은 B로 보입니다.", "정답은 B가 될 것입니다", "정답은 B가 맞습니다", "정답은 B가 가장 적절합니다",
            "정답은 B가 됩니다.", "정답은 B 되겠습니다.", "정답은 B로 하겠습니다.", "답은 B로 하겠습니다",
            "정답 번호: 2", "정답 번호: B", "정답번호 B", "선택한 답: B", "고른 답: B", "나의 선택: B",
            "Selected option: B", "Selected answer: B", "Chosen answer: B", "Your answer: B", "Predicted answer: B",
            "Answer key: B", "Answer Choice: B", "Correct choice: B", "The correct choice is B.", "Best answer: B",
            "최종답: B", "최종답변: B", "최종 답은 B", "★정답: B", "✅ 정답: B", "✅ B", "👉 B", "🅱", "정답👉B",
            "정답 ➜ B", "정답⇒B", "정답 => B", "정답->B", "<b>B</b>", "<p>정답: B</p>", "<|assistant|>B",
            "<start_of_turn>model\nB<end_of_turn>", "model\nB", "assistant\n\nB", "```\nB\n```",
            '```json\n{"answer": "B"}\n```', "{'answer': 'B'}", '{"answer":"B) 폐렴"}', '["B"]', '{"answer": ["B"]}',
            "B\n\n\n\n\n", "B  \n  ", "\tB", "B\r\n", "정답:\r\nB\r\n", "B\u3000", "정답은\u00a0B입니다",
            "정답은 B입니다\n정답은 B입니다\n정답은 B", "B.\n\nB.\n\nB.",
        ],
        "C": [
            "이 문제는 당뇨병성 케톤산증에 관한 것입니다. 초기 처치는 수액이므로 C를 정답으로 고릅니다.",
            "옳지 않은 것을 고르는 문제입니다. A, B, D, E는 옳은 설명이고 C는 틀린 설명입니다. 정답은 C입니다.",
            "A, B, D, E는 옳은 설명이고 C는 틀린 설명이므로 정답은 C",
            "Looking at the options:\n- A: too low\n- B: too low\n- C: correct dose\n- D: too high\n\nC",
            "Looking at the options, B and D can be eliminated. Between A and C, C is better supported.\n\nAnswer: C",
            "A would be correct if the patient were stable, but since she is unstable, the answer is C.",
            "While A is a common choice, the correct answer is C.", "Although B seems right, it's C.",
            "Not A, B or D. C is the answer.",
        ],
        "D": [
            "네, 정답은 D입니다!", "정답은요, D예요.", "답은 D요",
            "Group A streptococcus causes this. The answer is D.", "The patient is blood type B. The answer is D.",
            "정답은 D이다. 왜냐하면 A는 효과가 없고, B는 금기이며, C는 느리고, E는 고가이기 때문이다.",
            "D\n\n**해설**\n- A: 효과 없음\n- B: 금기\n- C: 느림\n- E: 고가",
            "D\n\nA) 효과 없음\nB) 금기\nC) 느림\nD) 적절\nE) 고가", "**D**\n\n**근거:** A와 B는 금기이다.",
            "D. 수액 투여\n\n이유:\nA. 금기\nB. 금기\nC. 느림",
            "정답은 D\n\n다른 선택지가 틀린 이유:\nA) 금기\nB) 금기",
        ],
        "E": [
            "비타민 K 결핍이 원인이다. 정답은 E (비타민 K)", "정답: E. 비타민 K", "정답은 E, 비타민 D 결핍이다",
            "The correct answer is E. E. coli.",
        ],
        None: [
            "문제를 분석해 보겠습니다. 환자는 38세 여성으로 TSH 상승이 있으며 갑상선기능저하증이 의심", "레보티록신",
            "2", "2)", "Type A personality", "A 형 독감", "정답은 A형 독감이다.", "The correct answer is E. coli.",
            "I'd eliminate B and D. A or C remain.", "C would be correct if stable.",
            "The answer cannot be determined.", "The answer depends on whether B is present.", "Answer unclear.",
            "No answer", "N/A", "TBD", "-", "...", "?",
            "Sorry, I need more information to answer. Options A through E were not provided.",
            "보기가 제공되지 않아 정답을 선택할 수 없습니다. 보기 A~E를 알려주세요.", "A~E 중 하나를 고르세요.",
            "정답은 A~E 중 하나", "저는 의료 전문가가 아니므로 정확한 답을 드릴 수 없습니다.",
            "의학적 조언은 전문의와 상담하세요.", '{"answer": ["B","C"]}', '{"answer": null}', '{"answer": ""}',
            "정답: B\n정답: B\n정답: C", "B\nC", "Answer: B\n\nAnswer: C", "정답은 B 또는", "정답은 B와",
            "The answer is B or", "The answer is B and", "정답은 B이거나 C", "정답은 B일지도 C일지도 모릅니다",
            "B 아니면 C일 듯", "50% B, 50% C", "B (70%), C (30%)", "A: 0.1\nB: 0.7\nC: 0.2", "A=10%, B=70%, C=20%",
            "A vs B", "A > B", "B > A", "혈액형은 A입니다.", "환자의 Child-Pugh 등급은 C이다.", "Killip class B",
            "TNM stage D", "그림에서 A는 심장이다.", "그래프의 A 지점에서",
        ],
    },
}

MORE_OPTIONS: dict[str | None, list[str]] = {
    "F": ["I think the answer is F.", "Answer: I would say F.", "The answer is (F) 2.5 mg", "Hence (F).", "(F)"],
    "G": ["⑦", "G. Initiate therapy", "A) x\nB) y\nC) z\nD) w\nE) v\nF) u\nG) t\nH) s\nThe answer is (G)."],
    "H": ["H", "Therefore, the correct answer is H: 3."],
    "I": ["The answer is I.", "The answer is (I)."],
    "J": ["The answer is (J).", "정답은 10번입니다.", "정답: ⑩"],
    None: ["I am not sure.", "I. Introduction\nII. Methods", "H. pylori infection", "The answer is H. pylori.",
           "G6PD deficiency", "The answer is A–J.",
           "The most likely diagnosis is hepatitis E.", "The correct answers are (F) and (J)."],
}
# fmt: on


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        pytest.param(output, expected, id=f"{family}-{number}")
        for family, by_letter in CASES.items()
        for number, (output, expected) in enumerate((o, x) for x, outputs in by_letter.items() for o in outputs)
    ],
)
def test_takes_what_a_careful_reader_takes(output: str, expected: str | None) -> None:
    assert parse(output) == expected


@pytest.mark.parametrize(("output", "expected"), [(o, x) for x, outputs in MORE_OPTIONS.items() for o in outputs])
def test_reads_ten_options(output: str, expected: str | None) -> None:
    assert parse(output, LETTERS) == expected


@pytest.mark.parametrize(("output", "letters"), [("정답: D", "ABC"), ("C", "AB"), ("정답은 3번", "AB"), ("⑤", "ABCD")])
def test_gives_no_letter_that_is_no_option(output: str, letters: str) -> None:
    assert parse(output, letters) is None
    assert parse(output, LETTERS) is not None


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
def test_real_outputs() -> None:
    cases = [json.loads(line) for line in (DATA / "extraction_cases.jsonl").read_text(encoding="utf-8").splitlines()]
    read = [(case["expected"], parse(case["output"], "".join(case["options"]))) for case in cases]
    assert sum(expected == found for expected, found in read) >= 65
    assert not [found for expected, found in read if expected is None and found is not None]


def test_the_old_name_reads_the_same() -> None:
    assert extract_answer_letter("**정답: D**") == "D"


# A token of the tokenizer's own, such as <|end|>, is no text: what a model writes ends there.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(
    lambda text: bool(text.strip()) and not re.search(r"<[|/a-z]", text)
)
# fmt: off
SENTENCES = st.lists(
    st.sampled_from(
        [
            "A는 금기이다.", "B가 가장 적절하다.", "(C)는 드물다.", "비타민 D가 낮다.", "A. 아스피린", "B. 와파린", "D",
            "따라서 정답은 E이다.", "The answer is A.", "Option B is wrong.", "1번은 틀리다.", "점수표: A=1, B=3", "\n",
            "**E**", "τ = F/A", "answer", "다음과 같다:",
        ]
    ),
    min_size=1,
    max_size=6,
).map(" ".join).filter(str.strip)
# fmt: on


@st.composite
def records(draw: st.DrawFn, text: st.SearchStrategy[str]) -> McqRecord:
    options = tuple(draw(st.lists(text, min_size=2, max_size=10)))
    rationale = draw(st.dictionaries(st.sampled_from(FIELDS), text))
    return McqRecord("1", draw(text), options, draw(st.sampled_from(LETTERS[: len(options)])), rationale=rationale)


@settings(deadline=None)  # the machine may be busy
@given(record=records(TEXT) | records(SENTENCES), style=st.sampled_from(MCQ_STYLES))
def test_reads_back_every_completion_that_the_prompts_render(record: McqRecord, style: str) -> None:
    completion = render_mcq(record, style, worked=record).completion
    assert parse(completion, record.letters) == record.answer
    assert parse(completion + "<end_of_turn>\n", record.letters) == record.answer


@settings(deadline=None)  # the machine may be busy
@given(st.text() | SENTENCES, st.sampled_from(["AB", "ABCDE", LETTERS]))
def test_any_output_gives_an_option_or_none(output: str, letters: str) -> None:
    assert parse(output, letters) in {None, *letters}
    assert 0 <= score_format(output, FIELDS, letters).score <= 1


@settings(deadline=None)  # the machine may be busy
@given(record=records(TEXT))
def test_rendered_completions_keep_the_whole_format(record: McqRecord) -> None:
    plain = McqRecord("1", "q", record.options, record.answer, rationale={name: "근거" for name in record.rationale})
    fields = [name for name in FIELDS if name in plain.rationale]
    found = score_format(render_mcq(plain).completion, fields, plain.letters)
    assert (found.score, found.kept, found.missing, found.answered) == (1.0, tuple(fields), (), True)


@pytest.mark.parametrize(
    ("output", "score", "kept", "answered"),
    [
        ("facts: 발열\nanalysis: B가 맞다\nanswer:\nB", 1.0, ("facts", "analysis"), True),
        ("facts: 발열\nanalysis:\nB가 맞다\nanswer: B\n", 1.0, ("facts", "analysis"), True),
        ("facts:\nanalysis: B가 맞다\nanswer:\nB", 2 / 3, ("analysis",), True),
        ("analysis: B가 맞다\nfacts: 발열\nanswer:\nB", 2 / 3, ("analysis",), True),
        ("facts: 발열\nanalysis: B\nanswer:\nB\nanswer:\nC", 2 / 3, ("facts", "analysis"), False),
        ("facts: 발열\nanalysis: B\nanswer:\nB, C", 2 / 3, ("facts", "analysis"), False),
        ("facts: 발열\nanalysis: B\nanswer:\nF", 2 / 3, ("facts", "analysis"), False),
        ("facts: 발열\nanswer:\nB\nanalysis: 발열", 2 / 3, ("facts", "analysis"), False),
        ("answer:\nB", 1 / 3, (), True),
        ("정답은 B입니다", 0.0, (), False),
        ("", 0.0, (), False),
    ],
)
def test_format_score_by_hand(output: str, score: float, kept: tuple[str, ...], answered: bool) -> None:
    found = score_format(output, ("facts", "analysis"))
    assert (found.score, found.kept, found.answered) == (pytest.approx(score), kept, answered)
    assert {*found.kept, *found.missing} == {"facts", "analysis"}


def test_total_weighs_the_format_one_third() -> None:
    totals = [score_total(kept, right) for kept, right in ((1, True), (1, False), (0, True), (0.5, False))]
    assert totals == pytest.approx([1, 1 / 3, 2 / 3, 1 / 6])


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("One might think the answer is A, but it is C.", "C"),
        ("You might assume the answer is B. Actually, the answer is D.", "D"),
        ("I would guess the answer is B", "B"),
        ("정답을 B로 오인할 수 있으나 정답은 E이다.", "E"),
        ("정답은 A라고 생각할 수 있지만 그렇지 않다.", None),
    ],
)
def test_what_others_might_think_is_no_verdict(output: str, letter: str | None) -> None:
    assert parse(output, "ABCDE") == letter
