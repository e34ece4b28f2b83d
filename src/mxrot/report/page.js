"use strict";
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  const show = (event, said) => {
    tip.hidden = !said;
    if (!said) return;
    tip.textContent = said;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(event.clientX + 14, room)) + "px";
    const below = event.clientY + 18;
    const fits = below + tip.offsetHeight < innerHeight;
    tip.style.top = (fits ? below : event.clientY - tip.offsetHeight - 12) + "px";
  };

  const sheets = new WeakMap();
  const sheet = (figure) => {
    if (!sheets.has(figure)) {
      const href = figure.querySelector("a.csv").getAttribute("href");
      const lines = decodeURIComponent(href.slice(href.indexOf(",") + 1)).trim().split("\n");
      sheets.set(figure, lines.map((line) => line.split(",")));
    }
    return sheets.get(figure);
  };

  const cell = (figure, map, x, y) => {
    const [left, top, width, height] = map.box;
    const row = Math.floor((map.rows * (y - top)) / height);
    const column = Math.floor((map.columns * (x - left)) / width);
    if (row < 0 || column < 0 || row >= map.rows || column >= map.columns) return "";
    const lines = sheet(figure);
    const line = lines[1 + map.first + row];
    const named = line.slice(0, map.skipped).map((value, at) => lines[0][at] + " " + value);
    const place = lines[0][map.skipped + column];
    return [...named, place].join(", ") + ": " + line[map.skipped + column] + " " + map.unit;
  };

  const NEAR = 16, SAME = 0.2, MOST = 4;
  for (const svg of document.querySelectorAll("svg[data-marks]")) {
    const figure = svg.closest("figure");
    let marks = null;
    svg.addEventListener("pointermove", (event) => {
      marks ??= JSON.parse(svg.dataset.marks);
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let said = [], nearest = NEAR;
      for (const mark of marks) {
        if (!Array.isArray(mark)) {
          said.push(cell(figure, mark, at.x, at.y));
          continue;
        }
        const far = Math.hypot(mark[0] - at.x, mark[1] - at.y);
        if (far < nearest - SAME) [nearest, said] = [far, [mark[2]]];
        else if (far < nearest + SAME && far < NEAR) said.push(mark[2]);
      }
      const lines = said.filter(Boolean);
      show(event, [...lines.slice(0, MOST), ...(lines.length > MOST ? ["..."] : [])].join("\n"));
    });
    svg.addEventListener("pointerleave", (event) => show(event, ""));
  }
  for (const part of document.querySelectorAll("[data-said]")) {
    part.addEventListener("pointermove", (event) => show(event, part.dataset.said));
    part.addEventListener("pointerleave", (event) => show(event, ""));
  }

  const worth = (row, at) => {
    const text = row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
    const number = Number(text.replaceAll(",", ""));
    return text === "" || Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return typeof a === "number" ? -1 : 1;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => (order === "ascending" ? 1 : -1) * compare(worth(a, at), worth(b, at)));
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
