// Runs before the page is drawn and without modules: the colours, so that they never flash in the others; and
// a word to who opened the page as a file, for which no browser runs modules.
"use strict";
if (location.protocol === "file:") {
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("notice-text").textContent =
      "A browser runs this page only from a server. Any will do: python3 -m http.server, in this folder.";
    document.getElementById("notice").hidden = false;
  });
}
const kept = localStorage.getItem("mobilellm.theme");
if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
