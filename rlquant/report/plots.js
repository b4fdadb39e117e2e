"use strict";
// Draws the figures that the page carries as JSON.
const figures = JSON.parse(document.getElementById("figures").textContent);
const config = { responsive: true, displaylogo: false, displayModeBar: false };

for (const name of ["retention", "size", "latency", "slowdown", "action_time", "episodes"]) {
  const place = document.getElementById("figure-" + name);
  if (place) Plotly.newPlot(place, figures[name].data, figures[name].layout, config);
}

const chooser = document.getElementById("weights-row");
if (chooser) {
  const labels = Object.keys(figures.weights);
  const place = document.getElementById("figure-weights");
  const draw = () => {
    for (const old of place.children) Plotly.purge(old);
    place.replaceChildren();
    for (const figure of figures.weights[labels[chooser.selectedIndex]]) {
      Plotly.newPlot(place.appendChild(document.createElement("div")), figure.data, figure.layout, config);
    }
  };
  chooser.addEventListener("change", draw);
  draw();
}
