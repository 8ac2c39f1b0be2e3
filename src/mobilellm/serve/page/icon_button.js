/** A button that shows one of the pictures of index.html, and says in words what it does. */
export function iconButton(icon, label, data) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "icon small";
  button.title = label;
  button.setAttribute("aria-label", label);
  Object.assign(button.dataset, data);
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${icon}`);
  picture.append(use);
  button.append(picture);
  return button;
}
