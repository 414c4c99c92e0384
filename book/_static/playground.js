/* The delta memory in the browser: three memories of 2 by 35 numbers, written with small pictures of letters.

   The first part is the arithmetic of `dn_lib.forms`; the suite compares both (tests/book/test_playground.py).
   The rest draws it: `#dn-playground` becomes the page to play with, every `.dn-demo` a picture that moves.
   Without this script, both stay the still pictures that the pages contain. */
"use strict";
(() => {
  // --- Arithmetic: S is d_k by d_v, an array of rows; k has d_k entries, v has d_v --------------------------------
  const zeros = (rows, columns) => Array.from({ length: rows }, () => new Array(columns).fill(0));
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const norm = (a) => Math.hypot(...a);

  /* What the state answers for a key: S^T k. */
  const read = (S, k) => S[0].map((_, j) => k.reduce((sum, x, i) => sum + x * S[i][j], 0));

  /* S + strength k e^T, a new state. */
  const add = (S, k, e, strength) => S.map((row, i) => row.map((x, j) => x + k[i] * (strength * e[j])));
  const erring = (S, k, v, beta) => {
    const answer = read(S, k);
    return add(S, k, v.map((x, j) => x - answer[j]), beta);
  };
  const RULES = {
    additive: (S, k, v) => add(S, k, v, 1),
    delta: (S, k, v, beta) => erring(S, k, v, beta),
    gated: (S, k, v, beta, alpha) => erring(S.map((row) => row.map((x) => alpha * x)), k, v, beta),
  };

  /* The state after all `writes`, each { k, v }, with one beta and one alpha, or `beta` and `alpha` of its own. */
  const run = (rule, writes, beta, alpha, rows = 2, columns = 35) =>
    writes.reduce((S, w) => RULES[rule](S, w.k, w.v, w.beta ?? beta, w.alpha ?? alpha), zeros(rows, columns));

  // --- Letters, colours, names ------------------------------------------------------------------------------------
  const LETTERS = {
    A: "01110 10001 10001 11111 10001 10001 10001",
    D: "11110 10001 10001 10001 10001 10001 11110",
    E: "11111 10000 10000 11110 10000 10000 11111",
    G: "01110 10001 10000 10111 10001 10001 01110",
    L: "10000 10000 10000 10000 10000 10000 11111",
    M: "10001 11011 10101 10101 10001 10001 10001",
    T: "11111 00100 00100 00100 00100 00100 00100",
  };
  const picture = (letter) => [...LETTERS[letter].replaceAll(" ", "")].map(Number);
  const MEMORIES = {
    additive: { name: "Additive", mark: "●", colour: "#0072B2", formula: "S + k vᵀ" },
    delta: { name: "Delta rule", mark: "■", colour: "#D55E00", formula: "S + β k (v − Sᵀk)ᵀ" },
    gated: { name: "Gated delta rule", mark: "◆", colour: "#CC79A7", formula: "αS + β k (v − αSᵀk)ᵀ" },
  };
  const RULE_NAMES = Object.keys(MEMORIES);
  const LIMIT = 1.5; // the magnitude at the ends of the colours
  const MAPS = {
    light: "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f", // Matplotlib's RdBu_r
    dark: "b3dcff 7cbcf0 4a97d0 2f6a97 24435e 20252c 5e3226 9a4a35 d56a4c f0957a ffc4b3", // the same, on dark paper
  };

  function colour(x) {
    const stops = MAPS[document.documentElement.dataset.theme === "dark" ? "dark" : "light"].split(" ");
    const place = ((Math.max(-LIMIT, Math.min(LIMIT, x)) + LIMIT) / (2 * LIMIT)) * (stops.length - 1);
    const below = Math.min(Math.floor(place), stops.length - 2);
    const channel = (stop, n) => parseInt(stops[stop].slice(2 * n, 2 * n + 2), 16);
    const mixed = (n) => channel(below, n) + (place - below) * (channel(below + 1, n) - channel(below, n));
    return [0, 1, 2].map((n) => Math.round(mixed(n)));
  }

  /* Draw 35 numbers as 7 rows of 5 pixels, with a margin of one; the style sheet makes the pixels large. */
  function paint(canvas, numbers) {
    canvas.width = 7;
    canvas.height = 9;
    const image = new ImageData(7, 9);
    for (let i = 0; i < 63; i++) {
      const [row, column] = [Math.floor(i / 7) - 1, (i % 7) - 1];
      const inside = row >= 0 && row < 7 && column >= 0 && column < 5;
      image.data.set([...colour(inside ? numbers[5 * row + column] : 0), 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  /* In words: the letter whose picture, or its negative, has the direction nearest to the answer's, and how far the
     answer is from that picture, relative to it. */
  function closest(answer) {
    if (norm(answer) < 0.05) return "nothing";
    const alike = (letter) => dot(answer, picture(letter)) / norm(picture(letter));
    const better = (best, other) => (Math.abs(alike(other)) > Math.abs(alike(best)) ? other : best);
    const letter = Object.keys(LETTERS).reduce(better);
    const [v, sign] = [picture(letter), Math.sign(alike(letter))];
    const off = norm(answer.map((x, j) => x - sign * v[j])) / norm(v);
    return `${sign < 0 ? "minus " : ""}${letter}, off by ${off.toFixed(2)}`;
  }
  const canvasOf = (label) => `<canvas role="img" width="7" height="9" aria-label="${label}"></canvas>`;
  const unit = (degrees) => [Math.cos((degrees * Math.PI) / 180), Math.sin((degrees * Math.PI) / 180)];

  // --- The page to play with --------------------------------------------------------------------------------------
  const EXAMPLES = {
    "Write over": "D0 G90 M0",
    "Right angle": "D0 G90",
    "Close keys": "D0 G30",
    "Three keys": "D0 G60 M120",
    "Opposite keys": "T0 T180",
  };
  const MOST = 24; // writes

  const memoryOf = (rule) => `<section class="dn-memory" data-rule="${rule}" aria-labelledby="dn-${rule}">
      <h2 id="dn-${rule}"><span aria-hidden="true">${MEMORIES[rule].mark}</span> ${MEMORIES[rule].name}</h2>
      <p class="dn-formula">S ← ${MEMORIES[rule].formula}</p>
      <div class="dn-pictures">
        <figure>${canvasOf("row 1 of the state")}<figcaption>row 1</figcaption></figure>
        <figure>${canvasOf("row 2 of the state")}<figcaption>row 2</figcaption></figure>
        <figure class="dn-answer">${canvasOf("answer")}<figcaption>answer</figcaption></figure>
      </div>
      <p class="dn-reads"></p>
    </section>`;

  const sliderOf = (name, label, most, value) => `<label class="dn-slider" for="dn-${name}">${label}
      <input type="range" id="dn-${name}" min="0" max="${most}" step="0.05" value="${value}">
      <span>${value.toFixed(2)}</span></label>`;

  const buttonOf = (kind, name, label = name) =>
    `<button type="button" data-${kind}="${name}" aria-label="${label}">${name}</button>`;

  const PAGE = `
    <div class="dn-controls">
      <div class="dn-key">
        <svg class="dn-dial" viewBox="-64 -64 128 128" role="slider" tabindex="0" aria-label="Angle of the key"
          aria-valuemin="0" aria-valuemax="355"><circle class="dn-rim" r="44"/><g class="dn-ticks"></g>
          <g class="dn-written"></g><line class="dn-arrow"/><circle class="dn-tip" r="6"/></svg>
      </div>
      <div class="dn-doing">
        <div role="group" aria-label="Write a letter under this key" class="dn-buttons">
          <span>Write under this key</span>
          ${Object.keys(LETTERS).map((c) => buttonOf("letter", c, `Write ${c}`)).join("")}
        </div>
        <div role="group" aria-label="Steps" class="dn-buttons">
          ${["Undo", "Step", "Reset"].map((name) => buttonOf("do", name)).join("")}
        </div>
      </div>
      <p class="dn-overlaps"></p>
      <div class="dn-sliders">
        ${sliderOf("beta", "β, strength of a write", 2, 1)}
        ${sliderOf("alpha", "α, what the gate keeps", 1, 0.9)}
      </div>
      <div role="group" aria-label="Examples" class="dn-buttons dn-examples">
        <span>Examples</span> ${Object.keys(EXAMPLES).map((name) => buttonOf("example", name)).join("")}
      </div>
    </div>
    <div class="dn-memories">${RULE_NAMES.map(memoryOf).join("")}</div>
    <p class="dn-said" role="status" aria-live="polite"></p>
    <p class="dn-legend" aria-hidden="true"><span>−${LIMIT}</span><canvas></canvas><span>${LIMIT}</span></p>
    <p id="dn-asked">What each memory answers, for every key that was used:</p>
    <div class="dn-recall" role="region" aria-labelledby="dn-asked" tabindex="0"><table></table></div>`;

  function play(root) {
    let [history, done, angle, beta, alpha, timer] = [[], 0, 0, 1, 0.9, 0];
    root.innerHTML = PAGE;
    root.classList.add("dn-ready");
    const find = (selector) => root.querySelector(selector);
    const dial = find(".dn-dial");
    const writes = () => history.slice(0, done);
    const state = (rule) => run(rule, writes(), beta, alpha);
    const answer = (rule) => `${MEMORIES[rule].name.toLowerCase()} ${closest(read(state(rule), unit(angle)))}`;

    /* What happened and what is read now; while a key turns, only where it comes to rest. */
    function say(what, wait = 0) {
      clearTimeout(timer);
      const text = `${what} Read at ${angle}°: ${RULE_NAMES.map(answer).join("; ")}.`;
      timer = setTimeout(() => (find(".dn-said").textContent = text), wait);
    }

    /* The keys in use, by angle, each with the letter last written under it. */
    const keys = () => new Map(writes().map((w) => [w.angle, w.letter]));

    function drawDial() {
      const at = (degrees, r) => unit(degrees).map((x, i) => (i ? -r * x : r * x)); // y points down on a screen
      const mark = (degrees, from, to) => {
        const [[x1, y1], [x2, y2]] = [at(degrees, from), at(degrees, to)];
        return `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`;
      };
      const labelled = ([degrees, letter]) => {
        const [[x, y], [tx, ty]] = [at(degrees, 44), at(degrees, 57)];
        return `<circle cx="${x}" cy="${y}" r="3"/><text x="${tx}" y="${ty}">${letter}</text>`;
      };
      find(".dn-ticks").innerHTML = [...Array(24).keys()].map((n) => mark(15 * n, n % 6 ? 42 : 39, 44)).join("");
      find(".dn-written").innerHTML = [...keys()].map(labelled).join("");
      const [x, y] = at(angle, 44);
      find(".dn-arrow").setAttribute("x2", x);
      find(".dn-arrow").setAttribute("y2", y);
      find(".dn-tip").setAttribute("cx", x);
      find(".dn-tip").setAttribute("cy", y);
      dial.setAttribute("aria-valuenow", angle);
      dial.setAttribute("aria-valuetext", `${angle} degrees`);
      const overlap = ([degrees, letter]) => {
        const cosine = (Math.round(100 * dot(unit(degrees), unit(angle))) / 100 + 0).toFixed(2);
        return `${letter} ${cosine.replace("-", "−")}`;
      };
      const overlaps = [...keys()].map(overlap).join(", ");
      find(".dn-overlaps").textContent = `Key at ${angle}°. ${overlaps && `Overlap with the key of ${overlaps}.`}`;
    }

    function drawRecall() {
      const columns = [...keys()];
      const row = (name, mark, numbers) => {
        const cell = ([a, c]) => `<td>${canvasOf(`${name} at ${a} degrees: ${closest(numbers(a, c))}`)}</td>`;
        const head = `<th scope="row"><span aria-hidden="true">${mark}</span> ${name}</th>`;
        return `<tr>${head}${columns.map(cell).join("")}</tr>`;
      };
      const rows = [["Written last", "○", (_, letter) => picture(letter)]];
      for (const rule of RULE_NAMES) {
        const S = state(rule);
        rows.push([MEMORIES[rule].name, MEMORIES[rule].mark, (degrees) => read(S, unit(degrees))]);
      }
      const head = `<tr><td></td>${columns.map(([a]) => `<th scope="col">${a}°</th>`).join("")}</tr>`;
      find(".dn-recall").hidden = find("#dn-asked").hidden = !columns.length;
      const body = rows.map((r) => row(...r)).join("");
      find(".dn-recall table").innerHTML = `<thead>${head}</thead><tbody>${body}</tbody>`;
      root.querySelectorAll(".dn-recall tbody tr").forEach((line, i) =>
        line.querySelectorAll("canvas").forEach((canvas, j) => paint(canvas, rows[i][2](...columns[j]))));
    }

    function draw() {
      drawDial();
      for (const rule of RULE_NAMES) {
        const section = find(`[data-rule=${rule}]`);
        const [first, second, answer] = section.querySelectorAll("canvas");
        const S = state(rule);
        const given = read(S, unit(angle));
        paint(first, S[0]);
        paint(second, S[1]);
        paint(answer, given);
        [first, second].forEach((canvas, i) =>
          canvas.setAttribute("aria-label", `row ${i + 1} of the state: ${closest(S[i])}`));
        answer.setAttribute("aria-label", `answer at ${angle} degrees: ${closest(given)}`);
        section.querySelector(".dn-reads").textContent = closest(given);
      }
      drawRecall();
      const legend = find(".dn-legend canvas");
      [legend.width, legend.height] = [61, 1];
      for (let i = 0; i <= 60; i++) {
        legend.getContext("2d").fillStyle = `rgb(${colour((i / 30 - 1) * LIMIT)})`;
        legend.getContext("2d").fillRect(i, 0, 1, 1);
      }
      const idle = { Undo: !done, Step: done === history.length, Reset: !history.length };
      for (const [name, off] of Object.entries(idle)) find(`[data-do=${name}]`).setAttribute("aria-disabled", off);
    }

    function turn(degrees) {
      angle = ((Math.round(degrees / 5) * 5) % 360 + 360) % 360;
      draw();
      say("", 250);
    }
    function write(letter) {
      if (done === MOST) return say(`${MOST} writes are enough: undo some, or reset.`);
      history = [...writes(), { angle, letter, k: unit(angle), v: picture(letter) }];
      done += 1;
      draw();
      say(`Write ${done}: ${letter} under ${angle}°.`);
    }
    function example(name) {
      history = EXAMPLES[name].split(" ").map((w) => [w[0], Number(w.slice(1))])
        .map(([letter, at]) => ({ angle: at, letter, k: unit(at), v: picture(letter) }));
      [done, angle] = [history.length, history[0].angle];
      draw();
      say(`${name}: ${history.map((w) => `${w.letter} under ${w.angle}°`).join(", ")}.`);
    }
    const actions = {
      undo() {
        if (!done) return say("There is nothing to undo.");
        done -= 1;
        draw();
        say(`Undone: ${history[done].letter} under ${history[done].angle}°.`);
      },
      step() {
        if (done === history.length) return say("No write is left to repeat.");
        const next = history[done++];
        draw();
        say(`Write ${done}: ${next.letter} under ${next.angle}°.`);
      },
      reset() {
        [history, done] = [[], 0];
        draw();
        say("All memories are empty.");
      },
    };

    root.addEventListener("click", ({ target }) => {
      const { letter, do: action, example: name } = target.closest("button")?.dataset ?? {};
      if (letter) write(letter);
      if (action) actions[action.toLowerCase()]();
      if (name) example(name);
    });
    root.addEventListener("input", () => {
      [beta, alpha] = ["beta", "alpha"].map((name) => Number(find(`#dn-${name}`).value));
      root.querySelectorAll(".dn-slider span").forEach((shown, i) => (shown.textContent = [beta, alpha][i].toFixed(2)));
      draw();
      say(`β ${beta.toFixed(2)}, α ${alpha.toFixed(2)}, in every write.`, 250);
    });
    dial.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 5, ArrowUp: 5, ArrowLeft: -5, ArrowDown: -5, PageUp: 30, PageDown: -30 };
      const to = { Home: 0, End: 355 }[event.key] ?? angle + steps[event.key];
      if (Number.isNaN(to)) return;
      event.preventDefault();
      turn(to);
    });
    const point = ({ clientX, clientY }) => {
      const box = dial.getBoundingClientRect();
      const [x, y] = [clientX - box.left - box.width / 2, box.top + box.height / 2 - clientY];
      turn((Math.atan2(y, x) * 180) / Math.PI);
    };
    dial.addEventListener("pointerdown", (event) => {
      dial.setPointerCapture(event.pointerId);
      point(event);
    });
    dial.addEventListener("pointermove", (event) => dial.hasPointerCapture(event.pointerId) && point(event));
    new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    example("Write over");
    root.state = state; // for the suite
  }

  // --- The picture that moves: DELTA, then GAMMA under the same five keys -------------------------------------------
  function demo(figure) {
    const [words, overlap] = ["DELTAGAMMA", 0.2];
    const own = (n, i) => (i === n ? Math.sqrt(1 - overlap) : 0);
    const key = (n) => [0, 1, 2, 3, 4, 5].map((i) => (i === 5 ? Math.sqrt(overlap) : own(n, i)));
    const writes = [...words].map((letter, n) => ({ k: key(n % 5), v: picture(letter) }));
    const rows = { "○ written last": null, "● adds": "additive", "■ delta rule": "delta" };
    const board = document.createElement("div");
    board.className = "dn-board";
    board.setAttribute("role", "img");
    board.setAttribute("aria-label", figure.querySelector("img").alt);
    board.innerHTML = Object.keys(rows).map((name) => `<span>${name}</span>` + "<canvas></canvas>".repeat(5)).join("");
    const button = document.createElement("button");
    button.type = "button";
    figure.querySelector("img").replaceWith(board, button); // the caption stays
    const cells = [...board.querySelectorAll("canvas")];
    let [count, timer] = [words.length, 0];

    function draw() {
      Object.values(rows).forEach((rule, row) => {
        const S = rule && run(rule, writes.slice(0, count), 1, 1, 6);
        for (let n = 0; n < 5; n++) {
          const last = count > n + 5 ? writes[n + 5] : writes[n];
          paint(cells[5 * row + n], S ? read(S, key(n)) : last.v.map((x) => (count > n ? x : 0)));
          cells[5 * row + n].classList.toggle("dn-now", count > 0 && count <= 10 && n === (count - 1) % 5);
        }
      });
    }
    function tick() {
      count = count >= words.length + 3 ? 0 : count + 1; // the end stands still for three ticks
      draw();
    }
    function move(moving) {
      clearInterval(timer);
      timer = moving ? setInterval(tick, 750) : 0;
      button.textContent = moving ? "Pause" : "Play";
    }
    button.addEventListener("click", () => move(!timer));
    const still = matchMedia("(prefers-reduced-motion: reduce)");
    still.addEventListener("change", () => move(!still.matches));
    addEventListener("beforeprint", () => {
      move(false);
      count = words.length;
      draw();
    });
    new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    draw();
    move(!still.matches);
  }

  window.DeltaMemory = { LETTERS, MEMORIES, read, run };
  const start = () => {
    document.querySelectorAll("#dn-playground").forEach(play);
    document.querySelectorAll(".dn-demo").forEach(demo);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
