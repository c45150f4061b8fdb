"use strict";
// Shows the map. Every text of the data goes into the page as textContent, and nothing else of it does.
(() => {
  const LAST = 65535, OTHERS = -1;
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const collator = new Intl.Collator("en", { numeric: true });
  const quantity = (n, noun, plural = noun + "s") => `${n.toLocaleString("en")} ${n === 1 ? noun : plural}`;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "onclick") made.addEventListener("click", value);
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }
  const named = (text) => element("bdi", {}, text);

  // What is in the data

  const counted = (values) => values.reduce((counts, value) => counts.set(value, (counts.get(value) ?? 0) + 1), new Map());
  const nodesOf = counted(data.nodes.map((node) => node.endpoint));
  const bearers = counted([...new Set(data.nodes.map((node) => JSON.stringify([node.name, node.endpoint])))].map((pair) => JSON.parse(pair)[0]));
  const nodes = data.nodes.map((node, number) => {
    const group = data.groups[node.group];
    const isHost = node.id === undefined;
    const profiles = group.profiles.map((n) => data.profiles[n]);
    const tags = [...new Set(profiles.flatMap((profile) => profile.tags))];
    const search = [node.name, ...node.addresses, ...tags].join("\n").toLowerCase();
    const hostName = data.hosts[node.host];
    const label = isHost ? node.name : node.name + (bearers.get(node.name) > 1 ? ` on ${hostName}` : "")
      + (nodesOf.get(node.endpoint) > 1 ? ` (${node.addresses.join(", ")})` : "");
    return { ...node, number, group, groupNumber: node.group, isHost, profiles, tags, search, hostName, label };
  });
  for (const group of data.groups) {
    group.sets = {};
    for (const version of Object.keys(group.traits)) group.sets[version] = new Set(group.traits[version]);
    for (const version of Object.keys(group.sent || {})) group.sent[version] = new Set(group.sent[version]);
  }
  for (const [number, parts] of data.decisions.entries()) {
    const byProtocol = new Map();
    for (const [protocol, first, ruling] of parts) {
      if (!byProtocol.has(protocol)) byProtocol.set(protocol, []);
      byProtocol.get(protocol).push([first, ruling]);
    }
    data.decisions[number] = byProtocol;
  }
  const passesAll = new Map([[OTHERS, [[0, null]]]]);

  function lookUp(tableNumber, traits) {
    const table = data.tables[tableNumber];
    const found = table.by[table.looks.filter((trait) => traits.has(trait)).join(",")];
    if (found === undefined) throw new Error("The file lacks a decision");
    return found;
  }

  /** The decisions at both ends, by IP version: [[version, outbound, inbound], …]; undefined for an end that is a host. */
  function decisionsOf(a, b) {
    const found = [];
    for (const version of ["4", "6"]) {
      const one = a.group, other = b.group;
      if (!one.sets[version] || !other.sets[version]) continue;
      const isNear = a.host === b.host;
      let seen = one.sets[version], outbound, inbound;
      if (!a.isHost && !isNear && one.sent?.[version] && !other.sets[version].has(0)) seen = one.sent[version];
      if (!a.isHost) {
        const tables = b.isHost && isNear ? one.toOwn[other.action] : one.out;
        outbound = lookUp(tables[version], other.sets[version]);
      }
      if (!b.isHost) {
        const tables = !a.isHost ? other.in : isNear ? other.fromOwn : other.fromHost;
        inbound = lookUp(tables[version], seen);
      }
      found.push([version, outbound, inbound]);
    }
    return found;
  }

  const verdicts = new Map();

  /** What passes from node a to node b: its text, its state (all, some, none), and the parts by IP version. */
  function verdict(a, b) {
    const decisions = decisionsOf(a, b);
    const key = decisions.join(";");
    let known = verdicts.get(key);
    if (!known) {
      const versions = decisions.map(([version, one, other]) => ({ version, parts: joined(one, other) }));
      const texts = versions.map(({ parts }) => spelled(parts));
      let text = texts[0] ?? "-";
      if (texts.length === 2 && texts[0] !== texts[1].replaceAll("icmpv6", "icmp")) text = `IPv4: ${texts[0]} | IPv6: ${texts[1]}`;
      const all = versions.flatMap(({ parts }) => parts.map((part) => part.allowed));
      const state = !all.includes(true) ? "none" : all.includes(false) ? "some" : "all";
      known = { text, state, versions };
      verdicts.set(key, known);
    }
    return known;
  }

  function joined(outbound, inbound) {
    const answers = [outbound, inbound].map((number) => (number === undefined ? passesAll : data.decisions[number]));
    const protocols = [...new Set(answers.flatMap((answer) => [...answer.keys()]))].filter((n) => n !== OTHERS).sort((x, y) => x - y);
    const found = [];
    for (const protocol of [...protocols, OTHERS]) {
      const columns = answers.map((answer) => answer.get(protocol) ?? answer.get(OTHERS));
      const starts = [...new Set(columns.flat().map(([first]) => first))].sort((x, y) => x - y);
      starts.forEach((first, place) => {
        const [out, into] = columns.map((column) => column.findLast(([start]) => start <= first)[1]);
        const allowed = [out, into].every((ruling) => ruling === null || data.rulings[ruling][0]);
        found.push({ protocol, first, last: (starts[place + 1] ?? LAST + 1) - 1, out, into, allowed });
      });
    }
    return found;
  }

  // Words, as in calicoctl's own

  const ORDER = ["tcp", "udp", "icmp", "icmpv6", "sctp", "udplite"];
  const protocolName = (number) => data.protocols[number] ?? `protocol ${number}`;
  const place = (number) => (ORDER.indexOf(data.protocols[number]) + 1 || 7) * 1000 + number;
  const isIcmp = (number) => number === 1 || number === 58;

  function ranges(parts, allowed) {
    const found = [];
    for (const part of parts) {
      if (part.allowed !== allowed) continue;
      const last = found[found.length - 1];
      if (last && last[1] + 1 === part.first) last[1] = part.last;
      else found.push([part.first, part.last]);
    }
    return found;
  }

  function numbers(protocol, some) {
    return some.map(([first, last]) => {
      if (!isIcmp(protocol)) return first === last ? `${first}` : `${first}-${last}`;
      const [type, code, lastType, lastCode] = [first >> 8, first & 255, last >> 8, last & 255];
      if (code === 0 && lastCode === 255) return type === lastType ? `type ${type}` : `type ${type}-${lastType}`;
      if (first === last) return `type ${type} code ${code}`;
      if (type === lastType) return `type ${type} code ${code}-${lastCode}`;
      return `type ${type} code ${code} to type ${lastType} code ${lastCode}`;
    }).join(", ");
  }

  function spelled(parts) {
    const passes = parts[parts.length - 1].allowed;
    const words = [];
    const protocols = [...new Set(parts.map((part) => part.protocol))].filter((n) => n !== OTHERS).sort((x, y) => place(x) - place(y));
    for (const protocol of protocols) {
      const own = parts.filter((part) => part.protocol === protocol);
      const shown = ranges(own, !passes), others = ranges(own, passes);
      if (!shown.length) continue;
      if (!others.length) words.push(protocolName(protocol));
      else if (others.length < shown.length) words.push(`${protocolName(protocol)} except ${numbers(protocol, others)}`);
      else words.push(`${protocolName(protocol)} ${numbers(protocol, shown)}`);
    }
    if (passes) return words.length ? `all except ${words.join("; ")}` : "all";
    return words.join("; ") || "-";
  }

  // What was dropped lately: drops between two nodes, and between two items

  const usableLast = [...nodes].sort((x, y) => Boolean(y.problem) - Boolean(x.problem));
  const byAddress = new Map(usableLast.flatMap((node) => node.addresses.map((address) => [address, node])));
  const dropped = data.drops.map((drop) => [byAddress.get(drop.from), byAddress.get(drop.to), drop]).filter(([a, b]) => a && b);
  const droppedBetween = new Map();

  function assignDrops(itemOf) {
    for (const [a, b, drop] of dropped) {
      const key = `${itemOf.get(a).number} ${itemOf.get(b).number}`;
      droppedBetween.set(key, [...(droppedBetween.get(key) ?? []), drop]);
    }
  }
  const dropsOf = (from, to) => droppedBetween.get(`${from.number} ${to.number}`) ?? [];

  // Filters

  let items = [], itemOf = new Map(), rows = [], columns = [], packets = null, chosen = null, cursor = { row: 0, column: 0 };
  const profilesOf = (item) => item.nodes[0].profiles.map((profile) => profile.name).join(", ");
  const itemOfNode = {};
  let itemCount = 0;

  /** Return a map from nodes to items. An item is a row or column: endpoints that policy treats alike, one endpoint, or a host. */
  function makeItems(isMerged) {
    const byGroup = new Map(), found = new Map();
    for (const node of nodes) {
      let item = isMerged && !node.isHost ? byGroup.get(node.groupNumber) : undefined;
      if (!item) item = { number: itemCount++, nodes: [], isHost: node.isHost };
      item.nodes.push(node);
      byGroup.set(node.groupNumber, item);
      found.set(node, item);
    }
    for (const item of new Set(found.values())) {
      const [{ label, hostName, addresses }, more] = [item.nodes[0], item.nodes.length - 1];
      const problem = item.nodes.find((node) => node.problem)?.problem;
      item.label = label + (more ? ` + ${more} more` : "");
      item.hasProblem = problem !== undefined;
      item.about = (item.isHost ? "host" : `${profilesOf(item) || "no profile"}, on ${hostName}${more ? " and others" : ""}`)
        + (more ? "" : `, ${addresses.join(", ") || "no address"}`) + (problem ? `; ${problem}` : "");
    }
    assignDrops(found);
    return found;
  }

  /** Set what is a row or column, sorted; an item that is shown again is the same object. */
  function useItems() {
    itemOf = itemOfNode[$("merge").checked] ??= makeItems($("merge").checked);
    items = [...new Set(itemOf.values())].filter((item) => !item.isHost || $("hosts").checked);
    const keys = {
      profile: (item) => [item.isHost, profilesOf(item), item.nodes[0].name],
      host: (item) => [item.isHost, item.nodes[0].hostName, item.nodes[0].name],
      name: (item) => [item.isHost, item.nodes[0].name, item.nodes[0].hostName],
    };
    const key = new Map(items.map((item) => [item, keys[$("order").value](item)]));
    items.sort((x, y) => key.get(x).map((part, n) => collator.compare(part, key.get(y)[n])).find((n) => n) ?? 0);
    items.forEach((item, place) => { item.place = place; });
    if (chosen) chosen = chosen.map((item) => item && itemOf.get(item.nodes[0]));
  }

  function packetsOf(text) {
    const words = text.trim().toLowerCase().split(/[\s:/]+/).filter(Boolean);
    if (!words.length) return null;
    const port = words.find((word) => /^\d{1,5}$/.test(word) && +word <= LAST);
    const names = words.filter((word) => word !== port);
    const known = Object.entries(data.protocols).filter(([, name]) => names.includes(name)).map(([number]) => +number);
    if (known.length !== names.length || words.length > 2 || (known[0] && isIcmp(known[0]) && port !== undefined)) return undefined;
    if (known.length && isIcmp(known[0])) return [[known[0], known[0] === 1 ? 8 << 8 : 128 << 8]];
    if (port === undefined && known.length) return known.map((protocol) => [protocol, null]);
    return (known.length ? known : [6, 17]).map((protocol) => [protocol, +port]);
  }

  /** The state of a verdict for the packets of the filter, or for all. */
  function stateOf(found) {
    if (!packets) return found.state;
    const states = [];
    for (const { version, parts } of found.versions) {
      for (const [protocol, number] of packets) {
        if ((protocol === 1 && version === "6") || (protocol === 58 && version === "4")) continue;
        const own = parts.filter((part) => part.protocol === protocol);
        const some = own.length ? own : parts.slice(-1);
        for (const part of some) if (number === null || (part.first <= number && number <= part.last)) states.push(part.allowed);
      }
    }
    return !states.includes(true) ? "none" : states.includes(false) ? "some" : "all";
  }

  /** Pairs of nodes that stand for all between two items. */
  function samples(from, to) {
    if (from.isHost && to.isHost) return [];
    if (from.isHost || to.isHost) {
      const pick = (item, host, isNear) => item.nodes.find((node) => (node.host === host) === isNear);
      return [true, false].map((isNear) => {
        const [a, b] = from.isHost ? [from.nodes[0], pick(to, from.nodes[0].host, isNear)] : [pick(from, to.nodes[0].host, isNear), to.nodes[0]];
        return a && b && [a, b];
      }).filter(Boolean);
    }
    for (const a of from.nodes.slice(0, 2)) for (const b of to.nodes.slice(0, 2)) if (a.endpoint !== b.endpoint) return [[a, b]];
    return [];
  }

  function cellOf(from, to) {
    const found = samples(from, to).map(([a, b]) => verdict(a, b));
    if (!found.length) return { state: "self", text: "" };
    const states = new Set(found.map(stateOf));
    return { state: states.size > 1 ? "some" : [...states][0], text: [...new Set(found.map((one) => one.text))].join(" or ") };
  }

  function applyFilters() {
    useItems();
    const name = $("name").value.trim().toLowerCase(), host = $("host").value, profile = $("profile").value;
    packets = packetsOf($("port").value);
    say(packets === undefined ? "This is no port: write tcp 80, udp 53, 443 or icmp" : "", true);
    packets ??= null;
    const fits = (node) => (!name || node.search.includes(name)) && (!host || node.hostName === host)
      && (!profile || node.profiles.some((one) => one.name === profile));
    const left = items.filter((item) => item.nodes.some(fits));
    const axis = $("axis").value;
    rows = axis === "to" ? items : left;
    columns = axis === "from" ? items : left;
    cursor = { row: 0, column: 0 };
    const isGraph = new FormData($("filters")).get("view") === "graph";
    $("matrix").hidden = isGraph;
    $("graph").hidden = !isGraph;
    body.scrollTo(0, 0);
    if (isGraph) drawGraph(); else layOut();
    if (!left.length) say(nodes.length ? "Nothing fits these filters" : "There are no endpoints and no hosts in etcd", true);
  }

  function say(text, isWrong = false) {
    $("message").textContent = text;
    $("message").classList.toggle("wrong", isWrong);
  }

  // Matrix: only the cells in view exist

  const body = $("body"), sheet = body.firstElementChild, top = $("columns").firstElementChild, side = $("rows").firstElementChild;
  const ROW = 24;
  let width = ROW, isWide = false;

  function layOut() {
    const room = $("view").clientWidth - 190;
    isWide = columns.length > 0 && columns.length * 96 <= room;
    width = isWide ? Math.min(210, Math.floor(room / columns.length)) : ROW;
    $("matrix").classList.toggle("wide", isWide);
    const longest = (some) => Math.max(6, ...some.map((item) => item.label.length));
    $("matrix").style.gridTemplateColumns = `${Math.max(112, Math.min(230, 26 + 7.6 * longest(rows)))}px 1fr`;
    $("columns").style.height = isWide ? "34px" : `${Math.min(190, 20 + 8 * longest(columns))}px`;
    sheet.style.width = `${columns.length * width}px`;
    sheet.style.height = `${rows.length * ROW}px`;
    body.setAttribute("aria-rowcount", rows.length);
    body.setAttribute("aria-colcount", columns.length);
    draw();
  }

  function draw() {
    const { scrollLeft, scrollTop, clientWidth, clientHeight } = body;
    const visible = (start, extent, size, count) => [Math.max(0, Math.floor(start / size) - 2), Math.min(count, Math.ceil((start + extent) / size) + 2)];
    const [left, right] = visible(scrollLeft, clientWidth, width, columns.length);
    const [first, last] = visible(scrollTop, clientHeight, ROW, rows.length);
    const hadFocus = document.activeElement?.getAttribute("role") === "gridcell";
    const rowOf = (r, some) => {
      const row = element("div", { role: "row", "aria-rowindex": r + 1 }, ...some.map((c) => cell(r, c)));
      row.style.top = `${r * ROW}px`;
      return row;
    };
    const made = range(first, last).map((r) => rowOf(r, range(left, right)));
    const { row, column } = cursor;  // its cell exists even out of view: it is where the Tab key leads to
    const isInView = first <= row && row < last && left <= column && column < right;
    if (!isInView && rows.length && columns.length) made.push(rowOf(row, [column]));
    sheet.replaceChildren(...made);
    top.replaceChildren(...range(left, right).map((c) => head(columns[c], c, { left: c * width, width, height: top.parentElement.clientHeight }, c === cursor.column)));
    side.replaceChildren(...range(first, last).map((r) => head(rows[r], r, { top: r * ROW, height: ROW, width: side.parentElement.clientWidth }, r === cursor.row)));
    top.style.transform = `translateX(${-scrollLeft}px)`;
    side.style.transform = `translateY(${-scrollTop}px)`;
    if (hadFocus) sheet.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
  }
  const range = (first, last) => Array.from({ length: Math.max(0, last - first) }, (_, n) => first + n);

  function head(item, number, box, isOn) {
    const made = element("div", { class: `head${isOn ? " on" : ""}${item.isHost ? " host" : ""}${item.hasProblem ? " problem" : ""}`, title: `${item.label} (${item.about})`, "data-number": number }, named(item.label));
    for (const [name, value] of Object.entries(box)) made.style[name] = `${value}px`;
    made.style.lineHeight = box.top === undefined && !isWide ? `${width}px` : `${ROW}px`;
    return made;
  }

  function cell(r, c) {
    const from = rows[r], to = columns[c], found = cellOf(from, to);
    const isCursor = r === cursor.row && c === cursor.column;
    const drops = dropsOf(from, to).length;
    const neither = from.isHost ? "no profile decides between hosts" : "the same endpoint";
    const shown = (found.text === "-" ? "nothing" : found.text || neither) + (drops ? `; ${quantity(drops, "drop")} lately` : "");
    const made = element("div", {
      role: "gridcell", "aria-colindex": c + 1, tabindex: isCursor ? 0 : -1, class: `cell ${found.state}`,
      "aria-label": `${from.label} to ${to.label}: ${shown}`, title: `${from.label} → ${to.label}: ${shown}`, "data-row": r, "data-column": c,
    }, isWide ? found.text : { all: "●", some: "◐" }[found.state] ?? "");
    if (drops) made.classList.add("dropped");
    if (chosen && chosen[0] === from && chosen[1] === to) made.classList.add("shown");
    made.style.left = `${c * width}px`;
    made.style.width = `${width}px`;
    made.style.height = `${ROW}px`;
    made.style.lineHeight = `${ROW - 2}px`;
    return made;
  }

  /** Show the cursor and the chosen pair in the cells that exist; to draw all again would take longer. */
  function mark() {
    for (const old of sheet.querySelectorAll("[tabindex='0'], .shown")) {
      old.tabIndex = -1;
      old.classList.remove("shown");
    }
    const at = (row, column) => sheet.querySelector(`[data-row='${row}'][data-column='${column}']`);
    const current = at(cursor.row, cursor.column);
    if (current) current.tabIndex = 0;
    if (chosen) at(rows.indexOf(chosen[0]), columns.indexOf(chosen[1]))?.classList.add("shown");
    for (const [heads, number] of [[top, cursor.column], [side, cursor.row]]) {
      for (const one of heads.children) one.classList.toggle("on", +one.dataset.number === number);
    }
  }

  let isAsked = false;
  body.addEventListener("scroll", () => {
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(() => { isAsked = false; draw(); });
  });
  new ResizeObserver(() => { if (!$("matrix").hidden) draw(); }).observe(body);

  function moveTo(row, column) {
    cursor = { row: Math.max(0, Math.min(rows.length - 1, row)), column: Math.max(0, Math.min(columns.length - 1, column)) };
    const into = (start, size, at, extent) => Math.min(Math.max(start, at * size + size - extent), at * size);
    const before = [body.scrollLeft, body.scrollTop];
    body.scrollTo(into(body.scrollLeft, width, cursor.column, body.clientWidth), into(body.scrollTop, ROW, cursor.row, body.clientHeight));
    if (before[0] === body.scrollLeft && before[1] === body.scrollTop) mark();
    else draw();
    sheet.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
  }

  body.addEventListener("click", (event) => {
    const hit = event.target.closest("[role=gridcell]");
    if (!hit) return;
    choose(rows[+hit.dataset.row], columns[+hit.dataset.column]);
    moveTo(+hit.dataset.row, +hit.dataset.column);
  });
  body.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(body.clientHeight / ROW) - 1);
    const { row, column } = cursor;
    const end = event.ctrlKey ? rows.length - 1 : row, start = event.ctrlKey ? 0 : row;
    const moves = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      PageUp: [row - page, column], PageDown: [row + page, column], Home: [start, 0], End: [end, columns.length - 1],
    };
    if (moves[event.key]) moveTo(...moves[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && rows[row] && columns[column]) { choose(rows[row], columns[column]); mark(); }
    else return;
    event.preventDefault();
  });

  // Graph

  const MOST = 48, DRAWN = 60, LISTED = 150, DENSE = 150;

  function shape(name, attributes, ...children) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function drawGraph() {
    const some = [...new Set([...rows, ...columns])].sort((x, y) => x.place - y.place);
    const edges = [];
    const isRound = some.length <= MOST;
    let center = chosen && !chosen[1] && some.includes(chosen[0]) ? chosen[0] : null;
    if (!isRound) center ??= some[0];
    const places = new Map();
    const add = (from, to) => {
      const found = cellOf(from, to);
      if (from !== to && (found.state === "all" || found.state === "some")) edges.push([from, to, found]);
    };
    let size;
    if (isRound) {
      for (const from of rows) for (const to of columns) add(from, to);
      const radius = Math.max(150, some.length * 6, Math.min($("view").clientHeight - 130, $("view").clientWidth - 460) / 2);
      size = [2 * radius + 420, 2 * radius + 90];
      const half = Math.ceil(some.length / 2);
      some.forEach((item, n) => {  // on a circle, clockwise; on either side at equal heights, so that no names overlap
        const isRight = n < half;
        const y = isRight ? (2 * n + 1) / half - 1 : 1 - (2 * (n - half) + 1) / (some.length - half);
        const x = Math.sqrt(1 - y * y) * (isRight ? 1 : -1);
        places.set(item, [size[0] / 2 + radius * x, size[1] / 2 + radius * y, isRight ? "start" : "end"]);
      });
    } else {
      const [sources, targets] = [[], []];
      for (const item of some) {
        if (item === center) continue;
        if (["all", "some"].includes(cellOf(item, center).state)) sources.push(item);
        if (["all", "some"].includes(cellOf(center, item).state)) targets.push(item);
      }
      const count = Math.max(Math.min(DRAWN, sources.length), Math.min(DRAWN, targets.length), 12);
      size = [Math.max(680, Math.min(1000, $("graph").clientWidth)), count * 22 + 70];
      const line = (list, x, anchor, isSource) => list.slice(0, DRAWN).forEach((item, n) => {
        const at = [x, 50 + n * 22 + ((count - Math.min(DRAWN, list.length)) * 22) / 2, anchor];
        const twin = { ...item, item };
        places.set(twin, at);
        edges.push(isSource ? [twin, center, cellOf(item, center)] : [center, twin, cellOf(center, item)]);
      });
      line(sources, 255, "end", true);
      line(targets, size[0] - 255, "start", false);
      places.set(center, [size[0] / 2, size[1] / 2, "middle"]);
      say(`${quantity(some.length, "node")} fit the filters, too many to draw: these reach ${center.label} (${sources.length}), `
        + `or are reached from it (${targets.length})${Math.max(sources.length, targets.length) > DRAWN ? `; the first ${DRAWN} of each` : ""}`);
    }
    const svg = shape("svg", { width: size[0], height: size[1], viewBox: `0 0 ${size[0]} ${size[1]}`, role: "group", class: edges.length > DENSE ? "dense" : "", "aria-label": "Graph: arrows lead to what may be reached" });
    const mark = shape("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7.5, refY: 4, markerWidth: 7, markerHeight: 7, markerUnits: "userSpaceOnUse", orient: "auto" }, shape("path", { d: "M0 0L8 4L0 8z" }));
    svg.append(shape("defs", {}, mark));
    const lines = edges.map(([from, to, found]) => {
      const [x1, y1] = places.get(from), [x2, y2] = places.get(to);
      const [mx, my] = [((x1 + x2) / 2) * 0.55 + (size[0] / 2) * 0.45 + (y2 - y1) * 0.06, ((y1 + y2) / 2) * 0.55 + (size[1] / 2) * 0.45 - (x2 - x1) * 0.06];
      const length = Math.hypot(x2 - mx, y2 - my) || 1;
      const d = isRound
        ? `M${x1} ${y1}Q${mx} ${my} ${x2 - ((x2 - mx) / length) * 9} ${y2 - ((y2 - my) / length) * 9}`
        : `M${x1} ${y1}C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2 - 9} ${y2}`;
      const line = shape("path", { class: `edge ${found.state}`, d, "marker-end": "url(#tip)" });
      line.append(shape("title", {}, `${from.label} → ${to.label}: ${found.text}`));
      line.addEventListener("click", () => choose(from.item ?? from, to.item ?? to));
      svg.append(line);
      return [line, from, to];
    });
    const highlight = (item) => {
      for (const [line, from, to] of lines) {
        const isOn = item && (from === item || to === item);
        line.classList.toggle("on", Boolean(isOn));
        line.classList.toggle("off", Boolean(item && !isOn));
      }
    };
    const groups = [];
    const stopAt = (one) => groups.forEach((group) => { group.tabIndex = group === one ? 0 : -1; });  // where Tab leads to
    for (const [item, [x, y, anchor]] of places) {
      const own = item.item ?? item;
      const label = item.label.length > 34 ? `${item.label.slice(0, 33)}…` : item.label;
      const shift = { start: 12, end: -12, middle: 0 }[anchor];
      const group = shape("g", { role: "button", "aria-label": `${item.label} (${item.about})`, class: `${item.isHost ? "host " : ""}${item.hasProblem ? "problem " : ""}${own === center ? "on" : ""}` },
        shape("title", {}, `${item.label} (${item.about})`), shape("circle", { cx: x, cy: y, r: 6.5 }),
        shape("text", { x: x + shift, y: y + (anchor === "middle" ? -14 : 4), "text-anchor": anchor }, label));
      const number = groups.push(group) - 1;
      for (const event of ["mouseenter", "focus"]) group.addEventListener(event, () => highlight(item));
      group.addEventListener("focus", () => stopAt(group));
      for (const event of ["mouseleave", "blur"]) group.addEventListener(event, () => highlight(isRound ? center : null));
      const pick = () => { choose(own); drawGraph(); [...$("graph").querySelectorAll("g")].find((g) => g.classList.contains("on"))?.focus(); };
      group.addEventListener("click", pick);
      group.addEventListener("keydown", (event) => {
        const moves = { ArrowUp: number - 1, ArrowLeft: number - 1, ArrowDown: number + 1, ArrowRight: number + 1, Home: 0, End: groups.length - 1 };
        if (event.key === "Enter" || event.key === " ") pick();
        else if (event.key in moves) groups[moves[event.key]]?.focus();
        else return;
        event.preventDefault();
      });
      svg.append(group);
    }
    stopAt(groups[Math.max(0, [...places.keys()].indexOf(center))]);
    if (isRound) highlight(center);
    $("graph").replaceChildren(svg);
    $("graph").scrollLeft = (size[0] - $("graph").clientWidth) / 2;
    if (!isRound) $("graph").scrollTop = (size[1] - $("graph").clientHeight) / 2;
  }

  // Details

  /** Show the rules between two items, or what is known of one. */
  function choose(from, to = null) {
    chosen = [from, to].map((item) => item && itemOf.get(item.nodes[0]));
    const hadFocus = $("panel").contains(document.activeElement);
    $("panel").replaceChildren(...(to ? aboutPair(...chosen) : aboutItem(chosen[0])));
    if (hadFocus) $("panel").focus();  // the button that was pressed is gone
    $("panel").scrollTop = 0;
  }

  function aboutPair(from, to) {
    const button = (item) => element("button", { type: "button", onclick: () => choose(item) }, named(item.label));
    const parts = [element("h2", {}, named(from.label), " → ", named(to.label)),
      element("p", {}, button(from), " ", button(to), " ", element("button", { type: "button", onclick: () => choose(to, from) }, "⇄ the other way"))];
    const pairs = samples(from, to);
    if (!pairs.length) parts.push(element("p", {}, from.isHost ? "No profile decides between hosts." : "It stays within the endpoint, where no profile applies."));
    for (const [a, b] of pairs) {
      if (pairs.length > 1) parts.push(element("h3", {}, a.host === b.host ? "On the same host" : "On different hosts"));
      parts.push(...rulesBetween(a, b));
    }
    const drops = dropsOf(from, to);
    if (drops.length) {
      const times = (drop) => (drop.count > 1 ? `, ${drop.count} times` : "");
      parts.push(element("h3", {}, `Dropped lately, as the agent of ${data.dropsOf} reports`),
        list(drops.map((drop) => `${drop.time}: ${drop.what}, ${drop.direction}${times(drop)} (${drop.why})`).reverse()));
    }
    return parts;
  }

  function rulesBetween(a, b) {
    const found = verdict(a, b);
    const word = { all: "Everything passes", some: `What passes: ${found.text}`, none: "Nothing passes" }[found.state];
    const shown = [element("p", { class: found.state === "none" ? "no" : "yes" }, word)];
    if (!found.versions.length) shown.push(element("p", {}, "They have no addresses of the same IP version."));
    for (const { version, parts } of found.versions) {
      const [here, there] = [a, b].map((node) => node.addresses.find((address) => address.includes(":") === (version === "6")));
      shown.push(element("h3", {}, `IPv${version}: ${here} to ${there}`));
      const table = element("table", {}, element("thead", {}, element("tr", {}, ...["Packets", "", "Why"].map((text) => element("th", { scope: "col" }, text)))));
      const lines = element("tbody");
      for (const part of parts) {
        const packetsText = part.protocol === OTHERS ? (parts.length > 1 ? "all others" : "all")
          : part.first === 0 && part.last === LAST ? protocolName(part.protocol) : `${protocolName(part.protocol)} ${numbers(part.protocol, [[part.first, part.last]])}`;
        const why = element("td");
        for (const [ruling, direction, node] of [[part.out, "outbound", a], [part.into, "inbound", b]]) {
          if (ruling === null) continue;
          const [passes, text] = data.rulings[ruling];
          why.append(element("div", {}, `${direction}: `, element("span", { class: passes ? "yes" : "no" }, passes ? "passes" : "denied"), ` (${reason(text, node)})`));
        }
        lines.append(element("tr", {}, element("td", {}, packetsText), element("td", { class: part.allowed ? "yes" : "no" }, part.allowed ? "pass" : "denied"), why));
      }
      table.append(lines);
      shown.push(table, element("p", { class: "soft" }, "Routes and agents, too:"), element("code", {}, `calicoctl profile trace ${here} ${there} ${example(parts)}`));
    }
    for (const node of [a, b]) if (node.problem) shown.push(element("p", { class: "no" }, named(node.name), `: ${node.problem}`));
    return shown;
  }

  function reason(text, node) {
    if (text !== "no rule of its profiles matches") return text;
    return node.profiles.length ? `no rule of ${node.profiles.map((profile) => profile.name).join(", ")} matches` : "it has no profile";
  }

  /** Packets to ask `profile trace` about: some that pass if there are any, else the fewest that a rule tells apart. */
  function example(parts) {
    const known = parts.filter((part) => [1, 6, 17, 58].includes(part.protocol));
    const part = known.find((one) => one.allowed) ?? known.sort((x, y) => x.last - x.first - (y.last - y.first))[0];
    if (!part) return "tcp 80";
    return isIcmp(part.protocol) ? protocolName(part.protocol) : `${protocolName(part.protocol)} ${Math.max(1, part.first)}`;
  }

  function aboutItem(item) {
    const parts = [element("h2", {}, named(item.label))];
    const node = item.nodes[0];
    if (item.isHost) parts.push(element("p", {}, `Host; addresses: ${node.addresses.join(", ") || "none"}; DefaultEndpointToHostAction: ${node.group.action}`));
    else if (item.nodes.length > 1) parts.push(element("p", {}, `${quantity(item.nodes.length, "endpoint")} that policy treats alike:`), list(item.nodes.map((one) => `${one.name} (${one.addresses.join(", ") || "no address"}) on ${one.hostName}`)));
    else parts.push(element("p", {}, `Endpoint ${node.id} on ${node.hostName}; addresses: ${node.addresses.join(", ") || "none"}`));
    for (const one of item.nodes) if (one.problem) parts.push(element("p", { class: "no" }, named(one.name), `: ${one.problem}`));
    for (const profile of item.isHost ? [] : node.profiles) {
      parts.push(element("h3", {}, "Profile ", named(profile.name)), element("p", { class: "soft" }, `tags: ${profile.tags.join(", ") || "none"}`));
      for (const direction of ["inbound", "outbound"]) {
        const rules = profile[direction];
        parts.push(element("p", {}, `${direction}: ${rules === null ? "everything is denied, for the profile does not exist, or its rules cannot be read" : rules.length ? "" : "no rules"}`));
        if (rules?.length) parts.push(list(rules, "ol"));
      }
    }
    const reached = { "May reach": (other) => [item, other], "May be reached from": (other) => [other, item] };
    for (const [title, ends] of Object.entries(reached)) {
      const some = items.map((other) => [other, cellOf(...ends(other))]).filter(([other, found]) => other !== item && (found.state === "all" || found.state === "some"));
      parts.push(element("h3", {}, `${title}${packets ? ` by ${$("port").value.trim()}` : ""}: ${some.length}`));
      const links = element("ul", { class: "links" });
      for (const [other, found] of some.slice(0, LISTED)) {
        links.append(element("li", {}, element("button", { type: "button", title: found.text, onclick: () => choose(...ends(other)) }, named(other.label))));
      }
      if (some.length > LISTED) links.append(element("li", { class: "soft" }, `and ${some.length - LISTED} more`));
      parts.push(links);
    }
    return parts;
  }

  function list(texts, kind = "ul") {
    const shown = texts.slice(0, LISTED).map((text) => element("li", {}, named(text)));
    if (texts.length > LISTED) shown.push(element("li", { class: "soft" }, `and ${texts.length - LISTED} more`));
    return element(kind, {}, ...shown);
  }

  // Start

  const endpoints = new Set(nodes.filter((node) => !node.isHost).map((node) => node.endpoint));
  $("summary").textContent = `${quantity(endpoints.size, "endpoint")} on ${quantity(data.hosts.length, "host")}, `
    + `${quantity(data.profiles.length, "profile")}; policy as of ${data.made}`
    + (dropped.length ? `; ${quantity(dropped.length, "drop")} lately, as the agent of ${data.dropsOf} reports` : "");
  $("drops").hidden = !dropped.length;
  if (data.problems.length) {
    $("problems").hidden = false;
    $("problems").querySelector("summary").textContent = `${quantity(data.problems.length, "object")} in etcd cannot be used, or only in part`;
    $("problems").querySelector("ul").append(...data.problems.map(([key, problem]) => element("li", {}, `${key}: ${problem}`)));
  }
  for (const [id, names] of [["host", data.hosts], ["profile", data.profiles.map((profile) => profile.name)]]) {
    $(id).append(...[...names].sort(collator.compare).map((name) => element("option", { value: name }, name)));
  }
  $("merge").checked = nodes.length > 60;
  let timer;
  $("filters").addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(applyFilters, event.target.type === "search" ? 120 : 0);
  });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("resize", () => { if (!$("matrix").hidden) layOut(); });
  $("panel").replaceChildren(element("h2", {}, "Who may reach whom"),
    element("p", {}, "Choose a cell of the matrix, or an arrow of the graph, to see the rules that decide."),
    element("p", { class: "soft" }, "This is what profiles say about the first packets of connections from an ephemeral port; answers pass. "
      + "Routes, and whether the agents run, are not in it."));
  applyFilters();
  window.calicoMap = { nodes, verdict };
})();
