"use strict";
for (const gallery of document.querySelectorAll(".gallery")) {
  const form = gallery.querySelector("form.controls");
  if (!form) continue;
  const list = gallery.querySelector(".episodes");
  const episodes = [...list.children];
  const status = form.querySelector("[role=status]");
  const orders = {
    "iou": (a, b) => a.dataset.iou - b.dataset.iou,
    "-iou": (a, b) => b.dataset.iou - a.dataset.iou,
    "class": (a, b) => a.dataset.class.localeCompare(b.dataset.class) || a.dataset.iou - b.dataset.iou,
    "size": (a, b) => a.dataset.size - b.dataset.size,
  };
  const update = () => {
    const wantedClass = form.elements["class"].value, wantedFault = form.elements["fault"].value;
    let shown = 0;
    for (const one of episodes) {
      const hit = (!wantedClass || one.dataset.class === wantedClass) && (!wantedFault || one.dataset.fault === wantedFault);
      one.hidden = !hit;
      shown += hit;
    }
    list.append(...[...episodes].sort(orders[form.elements["sort"].value]));
    status.textContent = `${shown} of ${episodes.length} drawn episodes`;
  };
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
}
for (const link of document.querySelectorAll("[data-show-class]")) {
  link.addEventListener("click", () => {
    const form = document.querySelector(`#${link.dataset.run}-episodes form.controls`);
    form.elements["class"].value = link.dataset.showClass;
    form.elements["fault"].value = "";
    form.dispatchEvent(new Event("change"));
  });
}
