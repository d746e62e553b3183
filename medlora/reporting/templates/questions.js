"use strict";
// Filters and sorts the questions that the page holds. It reads their data attributes and text and writes text alone.
const find = (id) => document.getElementById(id);
const list = find("list");
const cards = Array.from(list.children, (node, place) => ({
  node,
  place,
  test: node.dataset.t,
  subject: node.dataset.s,
  states: node.dataset.r,
  confidences: node.dataset.c.split(" ").map((value) => (value === "-" ? null : Number(value))),
  text: null,
}));
const fold = (text) => text.normalize("NFC").toLowerCase();
const value = (id) => (find(id) ? find(id).value : "");

function changed(states, kind, before, after) {
  const was = states[before], is = states[after];
  if (was === "-" || is === "-") return false;
  const gained = was !== "r" && is === "r", lost = was === "r" && is !== "r";
  return kind === "gained" ? gained : kind === "lost" ? lost : gained || lost;
}

function matches(card, wanted) {
  if (wanted.test && card.test !== wanted.test) return false;
  if (wanted.subject && card.subject !== wanted.subject) return false;
  if (wanted.state && card.states[wanted.stage] !== wanted.state) return false;
  if (wanted.change && !changed(card.states, wanted.change, wanted.before, wanted.after)) return false;
  if (!wanted.words.length) return true;
  if (card.text === null) card.text = fold(card.node.textContent);
  return wanted.words.every((word) => card.text.includes(word));
}

function filter() {
  const wanted = { words: fold(value("text")).split(/\s+/).filter(Boolean) };
  for (const id of ["test", "subject", "stage", "state", "change", "before", "after"]) wanted[id] = value(id);
  let found = 0;
  for (const card of cards) {
    const shown = matches(card, wanted);
    if (card.node.hidden === shown) card.node.hidden = !shown;
    found += shown;
  }
  find("found").textContent = `${found.toLocaleString("en")} of ${cards.length.toLocaleString("en")} questions`;
}

function sort() {
  const stage = value("stage"), order = value("order");
  const rank = (card) => (order === "wrong" ? "wufr-".indexOf(card.states[stage]) : 0);
  const sure = (card) => card.confidences[stage] ?? (order === "low" ? Infinity : -1);
  const sign = order === "low" ? 1 : -1;
  cards.sort((a, b) => rank(a) - rank(b) || (sure(a) === sure(b) ? a.place - b.place : sign * (sure(a) - sure(b))));
  list.append(...cards.map((card) => card.node));
}

let waiting = 0;
find("text").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(filter, 120);
});
for (const node of document.querySelectorAll("#controls select")) {
  node.addEventListener("change", () => {
    if (node.id === "order" || node.id === "stage") sort();
    filter();
  });
}
find("controls").hidden = false;
filter();
