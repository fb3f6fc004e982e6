// Gradio gives these controls no accessible name. A tab creates its controls only when it is opened.
const names = [
  [".multimodal-textbox textarea", "Your question"],
  [".multimodal-textbox input[type=file]", "Picture"],
  ["#audit-files input[type=file]", "Pictures to audit"],
];
function nameControls() {
  for (const [selector, name] of names) {
    for (const control of document.querySelectorAll(selector)) {
      if (control.getAttribute("aria-label") !== name) control.setAttribute("aria-label", name);
    }
  }
}
new MutationObserver(nameControls).observe(document.documentElement, { childList: true, subtree: true });
